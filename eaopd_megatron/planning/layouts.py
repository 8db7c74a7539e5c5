"""How a model is cut over GPUs: which numbers must divide which, and every layout of so many GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.models.supported import layout_reasons

if TYPE_CHECKING:
    from eaopd_megatron.config import StudentConfig
    from eaopd_megatron.models.shapes import ModelShape

GPUS_PER_HOST = 8


@dataclass(frozen=True)
class PlannedLayout(ParallelLayout):
    """The trainer's, and the number of copies."""

    data_parallel: int = 1

    @classmethod
    def of(cls, student: StudentConfig, gpus: int | None) -> PlannedLayout:
        """The recipe's own. gpus: to be filled with data-parallel copies; none: as the recipe says, or one host."""
        layout = student.parallel_layout
        if gpus is None:
            copies = student.data_parallel or max(1, GPUS_PER_HOST // layout.model_parallel_size)
        else:
            copies = max(1, gpus // layout.model_parallel_size)
        return cls(**asdict(layout), data_parallel=copies)

    @property
    def gpus(self) -> int:
        return self.model_parallel_size * self.data_parallel

    @property
    def generating_replicas(self) -> int:
        """Ranks, of each tensor-parallel group and pipeline one, that generate different sequences."""
        return self.data_parallel * self.context_parallel

    @property
    def expert_data_parallel(self) -> int:
        """Ranks with the same experts."""
        return self.gpus // self.expert_model_parallel_size

    @property
    def sequence_shards(self) -> int:
        """Over how many ranks the tokens between the matrices are spread."""
        return self.tensor_parallel if self.sequence_parallel else 1

    def in_flight(self, stage: int, micro_batches: int) -> float:
        """Micro-batches whose activations a stage holds at once, each counted with all of the stage's layers."""
        pp, vp = self.pipeline_parallel, self.virtual_pipeline
        if vp == 1:
            return min(pp - stage, micro_batches)
        return min(2 * (pp - stage - 1) + (vp - 1) * pp + 1, micro_batches * vp) / vp

    def bubble(self, micro_batches: int) -> float:
        """Idle time of a pipeline as a share of its working time."""
        return (self.pipeline_parallel - 1) / (micro_batches * self.virtual_pipeline)


def layout_refusals(shape: ModelShape, layout: PlannedLayout, label: str = "student.model") -> list[str]:
    """Return why a layout cannot hold a model, each starting with `label`; empty where it can."""
    found = [f"{label}: {reason}" for reason in layout_reasons(shape, layout)]
    if layout.gpus % layout.expert_model_parallel_size:
        found.append(
            f"{label}: expert_parallel x expert_tensor_parallel x pipeline_parallel="
            f"{layout.expert_model_parallel_size} does not divide the {layout.gpus} GPUs"
        )
    return found


def _divisors(number: int, most: int) -> list[int]:
    return [i for i in range(1, min(number, most) + 1) if number % i == 0]


def enumerate_layouts(gpus: int, *, experts: bool) -> Iterator[PlannedLayout]:
    """Every layout of so many GPUs; tensor parallelism within a host, always with sequence parallelism.

    experts: whether there are any that may be spread over ranks of their own.
    """
    for tp in _divisors(gpus, GPUS_PER_HOST):
        for pp in _divisors(gpus // tp, 16):
            for cp in _divisors(gpus // tp // pp, 8):
                stage = gpus // pp
                for etp in sorted({1, tp}) if experts else [1]:
                    for ep in _divisors(stage // etp, stage) if experts else [1]:
                        yield PlannedLayout(tp, tp > 1, pp, 1, cp, ep, etp, gpus // (tp * pp * cp))
