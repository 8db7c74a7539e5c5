"""The objective's terms, gate and weights, with the values of arXiv 2603.07079 as defaults. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

ReverseKL = Literal["sampled", "exact", "none"]
ForwardKL = Literal["topk", "topk_tail", "exact", "none"]
Gate = Literal["hard", "soft", "always", "never"]
Signal = Literal["topk", "logits", "hidden"]

GPU_TILE_ELEMENTS = 1 << 26  # logits per tile of `linear_entropy_aware_loss` on a GPU
LOGITS_CHUNK_ELEMENTS = 1 << 27  # logits that a teacher computes at once before reducing them to a `TeacherTopK`
MAX_EXCHANGE_BYTES_PER_TOKEN = 300  # upper bound per token and rank of the objective's all-gather, at top_k = 16
EXCHANGE_FLOATS_PER_TOKEN = 16  # typical fp32 values per token and rank in that all-gather

PRESETS: dict[str, dict[str, Any]] = {
    "opd": {"reverse_kl": "sampled", "forward_kl": "none"},
    "eopd": {"reverse_kl": "sampled", "forward_kl": "topk"},
    "eopd_exact": {"reverse_kl": "exact", "forward_kl": "exact"},
    "rkl": {"reverse_kl": "exact", "forward_kl": "none"},
    "fkl": {"reverse_kl": "none", "forward_kl": "exact", "gate": "always"},
}


@dataclass(frozen=True)
class Objective:
    """Loss per token: reverse_weight * R + forward_weight * gate(H) * F, with H the teacher's entropy in nats.

    reverse_kl      R: "sampled", the paper's clipped on-policy term; "exact", KL(student || teacher); "none"
    forward_kl      F: "topk", KL over the teacher's top_k ids, renormalised (the paper); "topk_tail", the same ids and
                    one bucket for the rest; "exact", KL(teacher || student); "none"
    gate            "hard", H > threshold (the paper); "soft", sigmoid((H - threshold) / gate_width); "always"; "never"
    threshold       tau in nats; +inf closes a hard gate, -inf opens it
    gate_width      nats
    clip            epsilon of the ratio's range [1 - epsilon, 1 + epsilon]; inf: no clipping

    Raises ValueError, naming the field.
    """

    reverse_kl: ReverseKL = "sampled"
    forward_kl: ForwardKL = "topk"
    gate: Gate = "hard"
    threshold: float = 0.8
    gate_width: float = 0.1
    forward_weight: float = 1.0
    reverse_weight: float = 1.0
    top_k: int = 16
    clip: float = 0.2

    PRESETS: ClassVar[tuple[str, ...]] = tuple(PRESETS)

    def __post_init__(self) -> None:
        for name, choices in (("reverse_kl", ReverseKL), ("forward_kl", ForwardKL), ("gate", Gate)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(choices))}")
        for name in ("threshold", "gate_width", "forward_weight", "reverse_weight", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{name}: {value!r} is not a number")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k!r} is not a whole number of at least 1")
        for name in ("gate_width", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not above 0")
        for name in ("forward_weight", "reverse_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a finite number of at least 0")
        if math.isinf(self.gate_width):
            raise ValueError("gate_width: inf is not finite")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Objective:
        """Return a named objective: "opd", "eopd" (the paper), "eopd_exact", "rkl", "fkl"; `changes` replace fields."""
        if name not in PRESETS:
            raise ValueError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def has_reverse(self) -> bool:
        """Whether the reverse term contributes to the loss."""
        return self.reverse_kl != "none" and self.reverse_weight > 0

    @property
    def has_forward(self) -> bool:
        """Whether the forward term can contribute to the loss."""
        return self.forward_kl != "none" and self.forward_weight > 0 and self.gate != "never"

    def refusal(self, signal: Signal) -> str | None:
        """Return why a teacher with this signal cannot serve the objective, in one line; None if it can."""
        if signal not in get_args(Signal):
            raise ValueError(f"signal: {signal!r} is not one of {', '.join(get_args(Signal))}")
        if signal == "topk":
            for name in ("reverse_kl", "forward_kl"):
                if getattr(self, name) == "exact":
                    others = '"topk" or "topk_tail"' if name == "forward_kl" else '"sampled"'
                    return (
                        f'{name}="exact" needs the teacher\'s whole distribution, and top-k log-probs are not that: '
                        f"choose {name}={others}, or a teacher that gives logits or hidden states"
                    )
        return None
