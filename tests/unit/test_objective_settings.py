"""An objective that means something else than its saved says must not be built."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from eaopd_megatron.objective import Objective


def test_the_defaults_are_the_papers() -> None:
    assert Objective() == Objective.preset("eopd")
    assert dataclasses.asdict(Objective()) == {
        "reverse_kl": "sampled",
        "forward_kl": "topk",
        "gate": "hard",
        "threshold": 0.8,
        "gate_width": 0.1,
        "forward_weight": 1.0,
        "reverse_weight": 1.0,
        "top_k": 16,
        "clip": 0.2,
    }


@pytest.mark.parametrize(
    ("name", "reverse", "forward", "gate"),
    [
        ("opd", "sampled", "none", "hard"),
        ("eopd", "sampled", "topk", "hard"),
        ("eopd_exact", "exact", "exact", "hard"),
        ("rkl", "exact", "none", "hard"),
        ("fkl", "none", "exact", "always"),
    ],
)
def test_presets_are_the_documented_ones(name: str, reverse: str, forward: str, gate: str) -> None:
    preset = Objective.preset(name)
    assert (preset.reverse_kl, preset.forward_kl, preset.gate) == (reverse, forward, gate)
    assert Objective.preset(name, threshold=0.5).threshold == 0.5


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="preset: 'eopb' is not one of opd, eopd, eopd_exact, rkl, fkl"):
        Objective.preset("eopb")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reverse_kl", "topk"),
        ("forward_kl", "sampled"),
        ("gate", "on"),
        ("threshold", math.nan),
        ("threshold", "0.8"),
        ("gate_width", 0.0),
        ("gate_width", math.inf),
        ("forward_weight", -1.0),
        ("forward_weight", math.inf),
        ("reverse_weight", -0.1),
        ("reverse_weight", True),
        ("top_k", 0),
        ("top_k", 16.0),
        ("clip", 0.0),
        ("clip", math.nan),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        Objective(**{field: value})


def test_an_objective_cannot_change_between_updates() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().threshold = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("field", ["reverse_kl", "forward_kl"])
def test_an_exact_term_is_refused_for_top_k_before_step_700(field: str) -> None:
    objective = Objective(**{field: "exact"})  # type: ignore[arg-type]
    assert f'{field}="exact"' in str(objective.refusal("topk"))
    assert objective.refusal("logits") is None


@pytest.mark.parametrize("forward", ["topk", "topk_tail", "none"])
@pytest.mark.parametrize("reverse", ["sampled", "none"])
def test_top_k_serves_everything_else(reverse: Any, forward: Any) -> None:
    assert Objective(reverse_kl=reverse, forward_kl=forward).refusal("topk") is None


def test_an_unknown_signal_is_no_silent_yes() -> None:
    with pytest.raises(ValueError, match="signal"):
        Objective().refusal("top-k")  # type: ignore[arg-type]
