"""Any objective, on a micro-batch of any shape, for hypothesis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from eaopd_megatron.objective import Objective
from tests.distributed.objective.cases import TOP_K


@dataclass(frozen=True)
class Variant:
    """An objective, the arguments of the case that it is tried on, and those of the call."""

    objective: Objective
    case: dict[str, Any]
    call: dict[str, Any]


@st.composite
def variants(draw: st.DrawFn, full: bool) -> Variant:
    """full: the teacher's signal is the full distribution, which exact terms need."""
    objective = Objective(
        reverse_kl=draw(st.sampled_from(["sampled", "exact", "none"])) if full else "sampled",
        forward_kl=draw(st.sampled_from(["topk", "topk_tail", "none"] + ["exact"] * full)),
        gate=draw(st.sampled_from(["hard", "soft", "always", "never"])),
        gate_width=draw(st.floats(0.01, 2)),
        forward_weight=draw(st.floats(0, 3)),
        reverse_weight=draw(st.floats(0, 3)),
        top_k=draw(st.integers(1, TOP_K)),
        clip=draw(st.sampled_from([0.05, 0.2, 1.5, math.inf])),
    )
    case = {
        "layout": draw(st.sampled_from(["even", "padded"])),
        "n": draw(st.integers(6, 20)),
        "seed": draw(st.integers(0, 99)),
    }
    return Variant(objective, case, {"chunk": draw(st.integers(1, 30)), "old": draw(st.booleans())})
