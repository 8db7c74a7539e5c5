"""Bytes on a GPU: what stays, and what each phase of an iteration adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eaopd_megatron.models.shapes import ModelShape, ParameterCounts, padded_vocab_size
from eaopd_megatron.planning.activations import FP32_BYTES, Activations, LayerPath, PlannedMicroBatch
from eaopd_megatron.planning.layouts import PlannedLayout
from eaopd_megatron.planning.workload import PlannedTeacher, Workload

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe

MemoryPhase = Literal["always", "training", "generation", "scoring", "update", "step"]
"""training: in all moments but generation."""
MEMORY_PHASES: tuple[MemoryPhase, ...] = ("generation", "scoring", "update", "step")
TILE = 2**26  # elements; objective/linear_head.py
TEACHER_LOGITS = 2**27  # elements; megatron/forward.py
EXCHANGED = 300  # bytes a token and rank, at most; objective/linear_head.py


@dataclass(frozen=True)
class MemoryPart:
    """Some bytes of a role, and the phase in which they are there."""

    role: Literal["student", "teacher", "rollout"]
    name: str
    bytes: float
    phase: MemoryPhase


@dataclass(frozen=True)
class GpuMemory:
    """A GPU of one pipeline stage."""

    stage: int
    parts: tuple[MemoryPart, ...]
    reserve: float

    def of(self, phase: MemoryPhase) -> float:
        """What a phase adds, or (always) what stays."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    def active_phases(self, moment: MemoryPhase) -> list[MemoryPhase]:
        """The phases whose parts are there at a moment; only those that have any."""
        phases: list[MemoryPhase] = ["always", moment] if moment == "generation" else ["always", "training", moment]
        return [phase for phase in phases if any(part.phase == phase for part in self.parts)]

    def at(self, moment: MemoryPhase) -> float:
        """Bytes at a moment, with the reserve."""
        return self.reserve + sum(map(self.of, self.active_phases(moment)))

    @property
    def fullest(self) -> MemoryPhase:
        """The moment that needs most."""
        return max(MEMORY_PHASES, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment, with the reserve."""
        return self.at(self.fullest)

    @property
    def largest(self) -> MemoryPart:
        """Of the parts that are there at that moment."""
        there = self.active_phases(self.fullest)
        return max((part for part in self.parts if part.phase in there), key=lambda part: part.bytes)


def weight_bytes(parameters: ParameterCounts, element: int) -> float:
    return parameters.total * element


def gradient_bytes(parameters: ParameterCounts) -> float:
    """Megatron's buffer of main gradients, in fp32."""
    return parameters.total * FP32_BYTES


def moment_bytes(parameters: ParameterCounts, layout: PlannedLayout, *, distributed: bool) -> float:
    """AdamW's two, in fp32.

    distributed: spread over the ranks that hold the same weights. Megatron's padding of shards is left out.
    """
    if not distributed:
        return parameters.total * 2 * FP32_BYTES
    dense_copies = layout.data_parallel * layout.context_parallel
    return 2 * FP32_BYTES * (parameters.dense / dense_copies + parameters.expert / layout.expert_data_parallel)


def main_parameter_bytes(
    parameters: ParameterCounts, layout: PlannedLayout, element: int, *, distributed: bool
) -> float:
    """The optimiser's fp32 copies of weights that are not fp32 themselves; spread as the moments are."""
    return moment_bytes(parameters, layout, distributed=distributed) / 2 if element < FP32_BYTES else 0.0


def kv_cache_bytes(shape: ModelShape, layers: int, layout: PlannedLayout, element: int) -> float:
    """Of one token in so many layers."""
    return layers * 2 * shape.kv_width / layout.tensor_parallel * element


@dataclass(frozen=True)
class StudentGpus:
    """Student and its rollouts on the same GPUs in the same layout, and what of its teachers is there.

    writer: who writes the responses. server: bytes of a GPU that a server on it takes while it does, and (process) all
    the time.
    """

    student: ModelShape
    teachers: Sequence[PlannedTeacher]
    layout: PlannedLayout
    work: Workload
    reserve: float
    path: LayerPath = "fused"
    writer: Literal["trainer", "colocated servers", "servers elsewhere"] = "trainer"
    server: float = 0.0
    process: float = 0.0

    def memory(self) -> GpuMemory:
        """Of the stage that needs most."""
        stages = [self.stage(i) for i in range(self.layout.pipeline_parallel)]
        return max(stages, key=lambda memory: memory.peak)

    def stage(self, stage: int) -> GpuMemory:
        parts = [*self._student(stage), *self._rollout(stage), *self._teachers(stage)]
        return GpuMemory(stage, tuple(part for part in parts if part.bytes), self.reserve)

    def activations(self, shape: ModelShape, element: int) -> Activations:
        return Activations(shape, self.layout, element, self.path, self.work.recompute)

    def _student(self, stage: int) -> Iterator[MemoryPart]:
        work, layout, element = self.work, self.layout, self.work.student_element
        held = self.student.rank_parameters(layout, stage)
        spread = work.distributed_optimizer
        batch, count = work.micro_batch(layout), work.micro_batches(layout)
        model = self.activations(self.student, element)
        yield MemoryPart("student", "weights", weight_bytes(held, element), "always")
        # colocated servers get this memory in their turn: megatron/offload.py
        kept: MemoryPhase = "training" if self.writer == "colocated servers" else "always"
        yield MemoryPart("student", "gradients (fp32)", gradient_bytes(held), kept)
        yield MemoryPart(
            "student", "main parameters", main_parameter_bytes(held, layout, element, distributed=spread), kept
        )
        when: MemoryPhase = "step" if work.offloaded_moments else kept
        yield MemoryPart("student", "Adam's moments", moment_bytes(held, layout, distributed=spread), when)
        yield MemoryPart("student", "activations", model.peak(batch, stage, count), "update")
        yield MemoryPart("student", "backward's workspace", model.workspace(batch), "update")
        if stage == layout.pipeline_parallel - 1:
            yield MemoryPart("student", "objective", self._objective(batch), "update")

    def _objective(self, batch: PlannedMicroBatch) -> float:
        """Of one micro-batch: the linear form's fp32 sum of the head's gradient, its tiles, hidden states twice."""
        work, shape, element = self.work, self.student, self.work.student_element
        rows = work.response_rows(batch, self.layout)
        columns = padded_vocab_size(shape.vocab, self.layout.tensor_parallel) / self.layout.tensor_parallel
        hidden = rows * shape.hidden * element
        signals = {scorer.signal for scorer in self.teachers}
        logits = hidden + rows * columns * (2 * element + 2.5) if "logits" in signals else 0.0
        if signals == {"logits"}:
            return logits
        tiles = min(TILE, rows * columns) * (2 if "hidden" in signals else 1) * element
        head = columns * shape.hidden * (FP32_BYTES + element)
        linear = 2 * hidden + rows * shape.hidden * FP32_BYTES + tiles + head
        return max(logits, linear + rows * EXCHANGED * self.layout.tensor_parallel)

    def _rollout(self, stage: int) -> Iterator[MemoryPart]:
        if self.writer == "trainer":
            yield from self._decoding(stage)
        elif self.writer == "colocated servers":
            yield MemoryPart("rollout", "server: weights and cache", self.server, "generation")
            yield MemoryPart("rollout", "server: CUDA and NCCL", self.process, "always")

    def _decoding(self, stage: int) -> Iterator[MemoryPart]:
        work, layout, element, shape = self.work, self.layout, self.work.student_element, self.student
        sequences = work.generated(layout)
        layers = len(layout.layers_of(stage, shape.layers))
        cache = sequences * work.longest * kv_cache_bytes(shape, layers, layout, element)
        tokens = sequences * work.longest_prompt * layout.context_parallel  # which decoding does not cut
        prompts = PlannedMicroBatch(tokens, tokens)
        yield MemoryPart("rollout", "key-value cache", cache, "generation")
        yield MemoryPart(
            "rollout", "prompts' workspace", self.activations(shape, element).workspace(prompts), "generation"
        )
        yield MemoryPart("rollout", "logits", sequences * shape.vocab * (element + 3 * FP32_BYTES), "generation")

    def _teachers(self, stage: int) -> Iterator[MemoryPart]:
        """They score one after the other, and a response is for one of them: of what that needs the largest counts."""
        last = stage == self.layout.pipeline_parallel - 1
        for scorer in self.teachers:
            yield from self._held(scorer, stage, last)
        yield from _largest(list(self._scoring(scorer, stage)) for scorer in self.teachers if scorer.colocated)
        yield from _largest([self._said(scorer, last)] for scorer in self.teachers)

    def _held(self, scorer: PlannedTeacher, stage: int, last: bool) -> Iterator[MemoryPart]:
        """What stays of a teacher, and what its output layer needs while an update uses it."""
        columns = padded_vocab_size(self.student.vocab, self.layout.tensor_parallel) / self.layout.tensor_parallel
        head = columns * scorer.shape.hidden * scorer.element if last and scorer.signal != "topk" else 0.0
        if not scorer.colocated:
            yield MemoryPart("teacher", "output layer", head, "always")
        elif scorer.offloaded:
            yield MemoryPart("teacher", "output layer", head, "update")
        else:
            weights = scorer.weights(self.layout, stage, self.student.vocab)
            yield MemoryPart("teacher", "weights", weights, "always")

    def _scoring(self, scorer: PlannedTeacher, stage: int) -> Iterator[MemoryPart]:
        if scorer.offloaded:
            weights = scorer.weights(self.layout, stage, self.student.vocab)
            yield MemoryPart("teacher", "weights, else in host memory", weights, "scoring")
        yield from scoring_parts(scorer, self.layout, self.work, self.path)

    def _said(self, scorer: PlannedTeacher, last: bool) -> MemoryPart:
        """What is kept of the responses on the GPU: of all, of an update's, or, from elsewhere, of a micro-batch's."""
        work, layout = self.work, self.layout
        if scorer.signal == "topk":
            kept = -(-work.prompts // layout.data_parallel) * work.longest_response * (12 * scorer.top_k + 8)
            return MemoryPart("teacher", "top-k of the iteration", kept, "update")
        if scorer.colocated:
            rows = work.samples(layout) * work.longest_response / layout.context_parallel
            return MemoryPart("teacher", "hidden states of an update", rows * scorer.bytes_per_token, "update")
        rows = work.response_rows(work.micro_batch(layout), layout) if last else 0.0
        return MemoryPart("teacher", "hidden states of a micro-batch", rows * scorer.bytes_per_token, "update")


def _largest(choices: Iterable[list[MemoryPart]]) -> list[MemoryPart]:
    return max(choices, key=lambda parts: sum(part.bytes for part in parts), default=[])


def scoring_parts(
    scorer: PlannedTeacher, layout: PlannedLayout, work: Workload, path: LayerPath
) -> Iterator[MemoryPart]:
    """What a teacher's forward pass over a micro-batch needs beside its weights."""
    shape, batch = scorer.shape, work.micro_batch(layout)
    model = Activations(shape, layout, scorer.element, path)
    yield MemoryPart("teacher", "workspace", model.workspace(batch), "scoring")
    if scorer.signal == "topk":
        columns = padded_vocab_size(shape.vocab, layout.tensor_parallel) / layout.tensor_parallel
        logits = min(TEACHER_LOGITS, work.response_rows(batch, layout) * columns)
        yield MemoryPart("teacher", "logits, a part at a time", logits * (scorer.element + FP32_BYTES), "scoring")


def separate_teacher_memory(
    scorer: PlannedTeacher, layout: PlannedLayout, work: Workload, reserve: float, path: LayerPath = "fused"
) -> GpuMemory:
    """A GPU of a teacher that has its own: weights, and a forward pass."""
    memories = []
    for stage in range(layout.pipeline_parallel):
        parts = [MemoryPart("teacher", "weights", scorer.weights(layout, stage), "always")]
        parts += scoring_parts(scorer, layout, work, path)
        if scorer.signal == "hidden":
            rows = work.micro_batch(layout).tokens / layout.context_parallel
            parts.append(MemoryPart("teacher", "hidden states", rows * scorer.bytes_per_token, "scoring"))
        memories.append(GpuMemory(stage, tuple(parts), reserve))
    return max(memories, key=lambda memory: memory.peak)


def served_teacher_memory(scorer: PlannedTeacher, limit: float) -> GpuMemory:
    """A GPU of an SGLang teacher: weights, and what its share of the GPU's bytes (limit) leaves for the cache."""
    held = scorer.weights(scorer.layout, 0)
    cache = max(0.0, scorer.memory_fraction * limit - held)
    parts = MemoryPart("teacher", "weights", held, "always"), MemoryPart("teacher", "key-value cache", cache, "always")
    return GpuMemory(0, parts, (1 - scorer.memory_fraction) * limit)


@dataclass(frozen=True)
class PlannedServers:
    """Of rollout.engine=sglang. What they hold has no part in the trainer's layout."""

    count: int = 1
    tensor_parallel: int = 1
    placement: Literal["separate", "colocated"] = "separate"
    memory_fraction: float = 0.8
    max_running: int = 64
    ahead: bool = False  # the next iteration's responses are written while this one trains

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PlannedServers | None:
        """None: the trainer writes them itself."""
        if recipe.rollout.engine == "local":
            return None
        chosen = recipe.servers
        return cls(
            count=len(chosen.urls) or chosen.count,
            tensor_parallel=chosen.tensor_parallel,
            placement=chosen.placement,
            memory_fraction=chosen.mem_fraction_static,
            max_running=chosen.max_concurrent_requests,
            ahead=recipe.rollout.max_staleness > 0,
        )

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def layout(self) -> PlannedLayout:
        """Of one."""
        return PlannedLayout(self.tensor_parallel)

    @property
    def gpus(self) -> int:
        """Of all."""
        return self.count * self.tensor_parallel

    def weights(self, student: ModelShape, element: int) -> float:
        """Bytes on a GPU."""
        return student.rank_parameters(self.layout, 0).total * element

    def cached_tokens(self, student: ModelShape, element: int, limit: float) -> float:
        """That a server's cache has room for, where a GPU has so many bytes (limit); below 0: none for the weights."""
        room = self.memory_fraction * limit - self.weights(student, element)
        return room / kv_cache_bytes(student, student.layers, self.layout, element)
