"""Bytes on a GPU: what stays, and what each phase of an iteration adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from eaopd_megatron.megatron.vocabulary import padded_vocab_size
from eaopd_megatron.planning.activations import FP32, Activations, MicroBatch, Path
from eaopd_megatron.planning.layouts import Layout
from eaopd_megatron.planning.shapes import ModelShape, Parameters
from eaopd_megatron.planning.workload import Workload

Phase = Literal["always", "generation", "scoring", "update", "step"]
TILE = 2**26  # elements; objective/linear_head.py
TEACHER_LOGITS = 2**27  # elements; megatron/forward.py
EXCHANGED = 300  # bytes a token and rank, at most; objective/linear_head.py


@dataclass(frozen=True)
class Part:
    """Some bytes of a role, and the phase in which they are there."""

    role: Literal["student", "teacher", "rollout"]
    name: str
    bytes: float
    phase: Phase


@dataclass(frozen=True)
class Memory:
    """A GPU of one pipeline stage."""

    stage: int
    parts: tuple[Part, ...]
    reserve: float

    def of(self, phase: Phase) -> float:
        """What a phase adds, or (always) what stays."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        phases: tuple[Phase, ...] = ("generation", "scoring", "update", "step")
        return max(phases, key=self.of)

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment, with the reserve."""
        return self.reserve + self.of("always") + self.of(self.fullest)

    @property
    def largest(self) -> Part:
        """Of the parts that are there at that moment."""
        return max((part for part in self.parts if part.phase in ("always", self.fullest)), key=lambda part: part.bytes)


def weights(parameters: Parameters, element: int) -> float:
    return parameters.total * element


def gradients(parameters: Parameters) -> float:
    """Megatron's buffer of main gradients, in fp32."""
    return parameters.total * FP32


def moments(parameters: Parameters, layout: Layout, *, distributed: bool) -> float:
    """AdamW's two, in fp32.

    distributed: spread over the ranks that hold the same weights. Megatron's padding of shards is left out.
    """
    if not distributed:
        return parameters.total * 2 * FP32
    dense_copies = layout.data_parallel * layout.context_parallel
    return 2 * FP32 * (parameters.dense / dense_copies + parameters.expert / layout.expert_data_parallel)


def main_parameters(parameters: Parameters, layout: Layout, element: int, *, distributed: bool) -> float:
    """The optimiser's fp32 copies of weights that are not fp32 themselves; spread as the moments are."""
    return moments(parameters, layout, distributed=distributed) / 2 if element < FP32 else 0.0


def kv_cache(shape: ModelShape, layers: int, layout: Layout, element: int) -> float:
    """Of one token in so many layers."""
    return layers * 2 * shape.kv_width / layout.tensor_parallel * element


@dataclass(frozen=True)
class Colocated:
    """Student, its rollouts and (none: somewhere else) its teacher on the same GPUs in the same layout."""

    student: ModelShape
    teacher: ModelShape | None
    layout: Layout
    work: Workload
    reserve: float
    path: Path = "fused"

    def memory(self) -> Memory:
        """Of the stage that needs most."""
        stages = [self.stage(i) for i in range(self.layout.pipeline_parallel)]
        return max(stages, key=lambda memory: memory.peak)

    def stage(self, stage: int) -> Memory:
        parts = [*self._student(stage), *self._rollout(stage), *self._teacher(stage)]
        return Memory(stage, tuple(part for part in parts if part.bytes), self.reserve)

    def activations(self, shape: ModelShape, element: int) -> Activations:
        return Activations(shape, self.layout, element, self.path, self.work.recompute)

    def _student(self, stage: int) -> Iterator[Part]:
        work, layout, element = self.work, self.layout, self.work.student_element
        held = self.student.on_rank(layout, stage)
        spread = work.distributed_optimizer
        batch, count = work.micro_batch(layout), work.micro_batches(layout)
        model = self.activations(self.student, element)
        yield Part("student", "weights", weights(held, element), "always")
        yield Part("student", "gradients (fp32)", gradients(held), "always")
        yield Part("student", "main parameters", main_parameters(held, layout, element, distributed=spread), "always")
        when: Phase = "step" if work.offloaded_moments else "always"
        yield Part("student", "Adam's moments", moments(held, layout, distributed=spread), when)
        yield Part("student", "activations", model.peak(batch, stage, count), "update")
        yield Part("student", "backward's workspace", model.workspace(batch), "update")
        if stage == layout.pipeline_parallel - 1:
            yield Part("student", "objective", self._objective(batch), "update")

    def _objective(self, batch: MicroBatch) -> float:
        """Of one micro-batch: the linear form's fp32 sum of the head's gradient, its tiles, hidden states twice."""
        work, shape, element = self.work, self.student, self.work.student_element
        rows = work.response_rows(batch, self.layout)
        columns = padded_vocab_size(shape.vocab, self.layout.tensor_parallel) / self.layout.tensor_parallel
        hidden = rows * shape.hidden * element
        if work.signal == "logits":
            return hidden + rows * columns * (2 * element + 2.5)
        tiles = min(TILE, rows * columns) * (2 if work.signal == "hidden" else 1) * element
        head = columns * shape.hidden * (FP32 + element)
        return 2 * hidden + rows * shape.hidden * FP32 + tiles + head + rows * EXCHANGED * self.layout.tensor_parallel

    def _rollout(self, stage: int) -> Iterator[Part]:
        work, layout, element, shape = self.work, self.layout, self.work.student_element, self.student
        sequences = work.generated(layout)
        layers = len(layout.layers_of(stage, shape.layers))
        cache = sequences * work.longest * kv_cache(shape, layers, layout, element)
        tokens = sequences * work.longest_prompt * layout.context_parallel  # which decoding does not cut
        prompts = MicroBatch(tokens, tokens)
        yield Part("rollout", "key-value cache", cache, "generation")
        yield Part("rollout", "prompts' workspace", self.activations(shape, element).workspace(prompts), "generation")
        yield Part("rollout", "logits", sequences * shape.vocab * (element + 3 * FP32), "generation")

    def _teacher(self, stage: int) -> Iterator[Part]:
        if self.teacher is None:
            return
        work, layout = self.work, self.layout
        shape = replace(self.teacher, tied=False) if work.swapped_rows else self.teacher
        held = shape.on_rank(layout, stage)
        yield Part("teacher", "weights", weights(held, work.teacher_element), "always")
        yield from scoring(self.teacher, layout, work, self.path)
        if work.signal == "topk":
            kept = -(-work.prompts // layout.data_parallel) * work.longest_response * (12 * work.top_k + 8)
            yield Part("teacher", "top-k of the iteration", kept, "update")
        else:
            rows = work.samples(layout) * work.longest_response / layout.context_parallel
            states = rows * self.teacher.hidden * work.teacher_element
            yield Part("teacher", "hidden states of an update", states, "update")


def scoring(shape: ModelShape, layout: Layout, work: Workload, path: Path) -> Iterator[Part]:
    """What a teacher's forward pass over a micro-batch needs beside its weights."""
    batch, element = work.micro_batch(layout), work.teacher_element
    model = Activations(shape, layout, element, path)
    yield Part("teacher", "workspace", model.workspace(batch), "scoring")
    if work.signal == "topk":
        columns = padded_vocab_size(shape.vocab, layout.tensor_parallel) / layout.tensor_parallel
        logits = min(TEACHER_LOGITS, work.response_rows(batch, layout) * columns)
        yield Part("teacher", "logits, a part at a time", logits * (element + FP32), "scoring")


def separate_teacher(shape: ModelShape, layout: Layout, work: Workload, reserve: float, path: Path = "fused") -> Memory:
    """A GPU of a teacher that has its own: weights, and a forward pass that gives hidden states."""
    memories = []
    for stage in range(layout.pipeline_parallel):
        held = Part("teacher", "weights", weights(shape.on_rank(layout, stage), work.teacher_element), "always")
        batch = work.micro_batch(layout)
        model = Activations(shape, layout, work.teacher_element, path)
        states = batch.tokens / layout.context_parallel * shape.hidden * work.teacher_element
        parts = (
            held,
            Part("teacher", "workspace", model.workspace(batch), "scoring"),
            Part("teacher", "hidden states", states, "scoring"),
        )
        memories.append(Memory(stage, parts, reserve))
    return max(memories, key=lambda memory: memory.peak)
