"""The documentation of the recipe's keys: recipes/README.md and `eaopd show RECIPE --explain KEY`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eaopd_megatron.config.aliases import section_keys, section_models, value_keys
from eaopd_megatron.config.loader import load_with_origins
from eaopd_megatron.config.recipe_reference import describe_key, explain_key, field_docstrings, recipe_reference
from eaopd_megatron.config.schema import Recipe
from eaopd_megatron.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
base: below.yaml
run: {folder: runs/x}
teachers: {math: {model: m, precision: fp32}, code: {}}
"""
BELOW = """\
student: {model: s}
teacher: {model: t, precision: fp32, replicas: 2, placement: separate}
train: {iterations: 3}
rollout: {max_lag: 0}
"""


@pytest.fixture
def explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Explains a key of r.yaml with seed=7."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("below.yaml").write_text(BELOW)
    recipe, origins = load_with_origins("r.yaml", ["seed=7"], report=lambda line: None)
    return lambda key: explain_key(recipe, origins, key)


def test_the_reference_of_the_recipes_is_old() -> None:
    command = "python -m eaopd_megatron.config.recipe_reference > recipes/README.md"
    assert (ROOT / "recipes" / "README.md").read_text() == recipe_reference(), f"recipes/README.md is old: {command}"


@pytest.mark.parametrize("section", ["", *section_models()])
def test_a_key_has_no_documentation(section: str) -> None:
    model = section_models()[section] if section else Recipe
    documented = field_docstrings(section)
    sections = () if section else section_models()  # whose classes have docstrings
    without = [name for name in model.model_fields if not documented.get(name) and name not in sections]
    assert model.__doc__
    assert not without, f"write a docstring under {', '.join(without)} of {model.__name__}"
    for name, text in documented.items():
        assert text.endswith((".", "]")), f"{section}.{name}: no sentence"


def test_a_key_is_missing_from_the_reference() -> None:
    text = recipe_reference()
    assert len(value_keys()) > 110
    for key in value_keys():
        assert text.count(f"\n| `{key}` | ") == 1, key
    for section in section_keys():
        assert not section or text.count(f"\n## `{section}`\n") == 1


def test_types_defaults_and_units_are_wrong() -> None:
    shown = {
        key: (info["type"], info["default"], info["unit"])
        for key in ("student.model", "teacher.tensor_parallel", "rollout.warn_truncated", "rollout.max_staleness")
        for info in [describe_key(key)]
    }
    assert shown == {
        "student.model": ("text", "required", ""),
        "teacher.tensor_parallel": ("integer ≥ 1 or null", "null", "ranks"),
        "rollout.warn_truncated": ("number > 0, < 1 or null", "0.5", ""),
        "rollout.max_staleness": ("integer ≥ 0, ≤ 1", "0", "iterations"),
    }
    assert describe_key("optimizer.schedule")["type"] == "cosine, linear, constant"
    assert describe_key("servers.urls")["type"] == "list of text"
    assert describe_key("run.on_corrupt_checkpoint")["old name"] == "run.on_damaged (renamed in 0.2, works until 0.3)"


@pytest.mark.parametrize(
    ("key", "value", "origin"),
    [
        ("seed", "7", "override 'seed=7'"),
        ("run.folder", "runs/x", "r.yaml"),
        ("student.model", "s", "below.yaml"),
        ("run.save_interval", "50", "the default"),
        ("rollout.max_staleness", "0", "below.yaml"),
        ("teachers.math.model", "m", "r.yaml"),
        ("teachers.math.replicas", "2", "below.yaml"),
        ("teachers.code.model", "t", "below.yaml"),
        ("teachers.code.offload", "none", "the default"),
    ],
)
def test_an_explanation_blames_another_file(explain: Callable[[str], str], key: str, value: str, origin: str) -> None:
    lines = explain(key).splitlines()
    assert lines[0] == f"{key} = {value}"
    assert lines[1].split(maxsplit=1) == ["from", origin]
    assert [line.split()[0] for line in lines[2:4]] == ["type", "default"]
    assert any(line.startswith("  meaning ") for line in lines)


def test_an_explanation_of_a_section_leaves_keys_out(explain: Callable[[str], str]) -> None:
    for section, kind in (("run", "run"), ("teachers.math", "teacher")):
        text = explain(section)
        shown = [line.partition(" = ")[0] for line in text.splitlines() if line[:1].strip() and " = " in line]
        assert shown == [f"{section}.{name}" for name in section_keys()[kind]]


def test_an_old_or_wrong_key_is_not_explained(explain: Callable[[str], str]) -> None:
    text = explain("rollout.max_lag")
    assert text.startswith("rollout.max_staleness = 0\n")
    assert "old name  rollout.max_lag (renamed in 0.2, works until 0.3)" in text
    for key, said in (
        ("train.batch_size", "train.batch_size: no such key; the number of responses per update is train.mini_batch"),
        ("optimiser", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("teachers.latin.model", "the recipe has no teacher latin; it has math, code"),
        ("teachers.math.modle", "unknown key 'teachers.math.modle'; did you mean 'teachers.math.model'?"),
    ):
        with pytest.raises(RecipeError) as error:
            explain(key)
        assert str(error.value) == said
