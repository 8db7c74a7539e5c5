"""Sections of the recipe that choose models, their layout over ranks, and the objective; field types of all sections.

The models are strict (no silent conversion of "8" or true into a number), frozen, and refuse unknown keys. The string
under a field is its documentation in recipes/README.md; a unit stands at its end in brackets. A rule on one key is in
its type, a rule on several in the section's own validators. Whether a key may change at a resume stands in its type
 (`Free`, `Logged`) or, for all keys of a section, in `Section.at_resume`.
"""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from enum import Enum
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.objective.settings import Objective

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
UnitFraction = Annotated[float, Field(gt=0, le=1)]
FloatOrInfinity = Annotated[float, Field(allow_inf_nan=True)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
FilePath = Annotated[NonEmptyStr, AfterValidator(os.path.expanduser)]


class AtResume(Enum):
    """Whether a key may have another value at the resume of a trained run. The value is the reference's text."""

    FREE = "yes"
    """It changes nothing but the rounding of sums."""
    LOGGED = "logged"
    """It changes the rest of the run: with a line in the log, and `changed/KEY` in the metrics."""
    NEVER = "no"
    """The result would be that of no recipe."""


T = TypeVar("T")
Free = Annotated[T, AtResume.FREE]
Logged = Annotated[T, AtResume.LOGGED]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, immutable."""

    at_resume: ClassVar[AtResume] = AtResume.NEVER
    """Of the section's keys that do not say it themselves."""

    # the outermost section builds the validators of the inner ones, which takes a third of the time of building each
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class StudentConfig(Section):
    """The model that is trained, and its layout over the ranks."""

    model: NonEmptyStr
    """Hugging Face folder, or hub id `owner/name` or `owner/name@COMMIT`."""
    tensor_parallel: Free[PositiveInt] = 1
    """Tensor-parallel size. [ranks]"""
    pipeline_parallel: Free[PositiveInt] = 1
    """Pipeline-parallel size. [ranks]"""
    virtual_pipeline: Free[PositiveInt] = 1
    """Model chunks per rank. 2 or more: the interleaved schedule; needs `pipeline_parallel` of 2 or more."""
    context_parallel: Free[PositiveInt] = 1
    """Context-parallel size: ranks that share the tokens of a micro-batch. [ranks]"""
    expert_parallel: Free[PositiveInt] = 1
    """Expert-parallel size: ranks that share the experts of a mixture-of-experts model. [ranks]"""
    expert_tensor_parallel: Free[PositiveInt] = 1
    """Tensor-parallel size of each expert's matrices. [ranks]"""
    data_parallel: Free[PositiveInt | None] = None
    """Copies of the student. null: as many as the started ranks, or the devices of this host, allow."""
    sequence_parallel: Free[bool] = False
    """Megatron's sequence parallelism; needs `tensor_parallel` of 2 or more."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; main parameters and moments are fp32."""
    recompute: Free[Literal["none", "selective", "full"]] = "none"
    """Activations recomputed in the backward pass. selective: attention; full: whole layers."""

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("student.sequence_parallel is true, which needs student.tensor_parallel of 2 or more")
        if (chunks := self.virtual_pipeline) > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"student.virtual_pipeline is {chunks}, which needs student.pipeline_parallel of 2 or more"
            )
        layout = self.parallel_layout
        ranks = layout.model_parallel_size * (self.data_parallel or 0)
        if ranks % layout.expert_model_parallel_size:
            raise ValueError(
                "student.expert_parallel x expert_tensor_parallel x pipeline_parallel is "
                f"{layout.expert_model_parallel_size}, which does not divide the {ranks} ranks that "
                f"student.data_parallel={self.data_parallel} makes"
            )
        return self

    @property
    def parallel_layout(self) -> ParallelLayout:
        """How one copy is sharded over ranks."""
        return ParallelLayout(**{field.name: getattr(self, field.name) for field in fields(ParallelLayout)})


class TeacherConfig(Section):
    """The model whose distribution the student learns, where it runs, and what it returns per token.

    `teachers.NAME` has the same keys.
    """

    model: NonEmptyStr
    """Hugging Face folder, or hub id `owner/name` or `owner/name@COMMIT`."""
    placement: Free[Literal["colocated", "separate", "served"]] = "colocated"
    """colocated: on the student's ranks; separate: on ranks of its own (`eaopd teach`); served: by SGLang."""
    signal: Literal["auto", "topk", "hidden", "logits"] = "auto"
    """What is kept of a token. auto: topk if the objective can use it, else hidden; logits: colocated only."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Precision of the weights. fp8: on GPUs with Transformer Engine."""
    tokenizer_check: Logged[Literal["exact", "shared"]] = "exact"
    """Tokens that the teacher's tokenizer may have otherwise. exact: none; shared: added and special tokens, whose ids
    are left out of the teacher's distribution and of responses."""
    terminal_map: Logged[Literal["swap", "label", "none"]] = "swap"
    """How the teacher's end token is matched with the student's. swap: exchange the two ids in the teacher's
    vocabulary; label: look up the log-prob of a response's end token under the teacher's id (the paper); none."""
    offload: Free[Literal["none", "weights"]] = "none"
    """weights: a colocated teacher's weights stay in host memory except while it scores."""
    tensor_parallel: Free[PositiveInt | None] = None
    """Tensor-parallel size. null: 1; a colocated teacher always has the student's. [ranks]"""
    pipeline_parallel: Free[PositiveInt | None] = None
    """Pipeline-parallel size. null: 1; a colocated teacher always has the student's. [ranks]"""
    expert_parallel: Free[PositiveInt | None] = None
    """Expert-parallel size. null: 1; a colocated teacher always has the student's. [ranks]"""
    replicas: Free[PositiveInt] = 1
    """Replicas that the trainer starts on its own host (separate, served)."""
    urls: Free[list[NonEmptyStr]] = []
    """URLs of replicas that run already; none are started then."""
    listen: Free[NonEmptyStr] = "127.0.0.1:0"
    """HOST:PORT on which `eaopd teach` serves; port 0: any free port."""
    api_key_file: Free[FilePath | None] = None
    """File with the replicas' API key (mode 0600). null: replicas that are started here get a generated one."""
    max_concurrent_requests: Free[PositiveInt] = 8
    """Requests in flight per replica."""
    mem_fraction_static: Free[UnitFraction] = 0.8
    """Share of a GPU's memory for weights and KV cache of a served teacher."""
    startup_timeout_minutes: Free[PositiveFloat] = 30.0
    """Longest wait until the replicas are ready. [minutes]"""
    unavailable_timeout_minutes: Free[PositiveFloat] = 10.0
    """Time without any replica after which the run saves its state and stops. [minutes]"""

    @property
    def launched_by_trainer(self) -> bool:
        """Whether the trainer starts and stops the replicas."""
        return self.placement != "colocated" and not self.urls

    @property
    def parallel_layout(self) -> ParallelLayout:
        """How a separate teacher is sharded over ranks, or a served one over GPUs."""
        tp, pp, ep = self.tensor_parallel or 1, self.pipeline_parallel or 1, self.expert_parallel or 1
        return ParallelLayout(
            tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep, sequence_parallel=tp > 1 < ep
        )

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        colocated = self.placement == "colocated"
        layout = (self.tensor_parallel, self.pipeline_parallel, self.expert_parallel)
        for wrong, why in (
            (colocated and any(layout), "has the student's layout: no teacher.tensor_parallel, pipeline_, expert_"),
            (colocated and (self.urls or self.replicas > 1), "is on the student's ranks: no teacher.urls, replicas"),
            (not colocated and self.offload != "none", "is not on the student's GPUs: no teacher.offload"),
            (not colocated and self.signal == "logits", "hands over topk or hidden: no teacher.signal=logits"),
            (self.placement == "served" and self.signal == "hidden", "hands over topk: no teacher.signal=hidden"),
            (self.placement == "served" and any(layout[1:]), "has tensor_parallel alone: no pipeline_, expert_"),
            (self.placement == "served" and self.precision == "fp8", "is started in bf16 or fp32: no precision=fp8"),
        ):
            if wrong:
                raise ValueError(f"a teacher with teacher.placement={self.placement} {why}")
        if self.precision == "fp8" and self.offload == "weights":
            raise ValueError(
                "teacher.offload=weights moves weights in fp32 or bf16, not those of teacher.precision=fp8"
            )
        return self


class ObjectiveConfig(Section):
    """A preset of the objective, and the fields that differ from it (null: the preset's value)."""

    preset: NonEmptyStr = "eopd"
    """opd: sampled reverse KL; eopd: with a gated forward KL over the teacher's top-k (the paper); eopd_exact: both
    over the whole vocabulary; rkl, fkl: one of them, over the whole vocabulary, on every token."""
    reverse_kl: str | None = None
    """sampled: the paper's clipped policy-gradient term; exact: KL(student || teacher); none."""
    forward_kl: str | None = None
    """topk: KL over the teacher's top-k, renormalised; topk_tail: with one bucket for the rest; exact; none."""
    gate: str | None = None
    """Tokens that get the forward KL, by the teacher's entropy. hard: above the threshold; soft: a sigmoid around it;
    always; never."""
    threshold: Logged[FloatOrInfinity | None] = None
    """Entropy of the teacher above which a hard gate opens. [nats]"""
    gate_width: Logged[float | None] = None
    """Width of the soft gate's sigmoid. [nats]"""
    forward_weight: Logged[float | None] = None
    """Weight of the forward KL."""
    reverse_weight: Logged[float | None] = None
    """Weight of the reverse KL."""
    top_k: Logged[int | None] = None
    """Size of the teacher's top-k. [tokens]"""
    clip: Logged[FloatOrInfinity | None] = None
    """Half-width of the clipping range of the sampled term's ratio, around 1. .inf: not clipped."""
    threshold_end: Logged[float | None] = None
    """Value that `threshold` reaches after `ramp_updates`. null: it stays. [nats]"""
    forward_weight_end: Logged[NonNegativeFloat | None] = None
    """Value that `forward_weight` reaches after `ramp_updates`. null: it stays."""
    ramp: Logged[Literal["linear", "cosine"]] = "linear"
    """Shape of the way to the end values."""
    ramp_updates: Logged[PositiveInt | None] = None
    """Length of the ramp. null: the whole run. [updates]"""

    def build_objective(self) -> Objective:
        """Return the objective. Raises ValueError, naming the field, for a value that it does not take."""
        names = {field.name for field in fields(Objective)}
        changes = {name: value for name, value in self if name in names and value is not None}
        objective = replace(Objective.preset(self.preset), **changes)
        if self.threshold_end is not None and math.isinf(objective.threshold):
            raise ValueError("threshold_end needs a finite threshold to start from")
        return objective
