"""Bytes on a GPU: what stays, and what each phase of an iteration adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from eaopd_megatron.models.shapes import ModelShape, ParameterCounts, padded_vocab_size
from eaopd_megatron.objective.settings import GPU_TILE_ELEMENTS, LOGITS_CHUNK_ELEMENTS, MAX_EXCHANGE_BYTES_PER_TOKEN
from eaopd_megatron.planning.activations import FP32_BYTES, INDEX_BYTES, Activations, LayerPath
from eaopd_megatron.planning.workload import PlannedLayout, PlannedMicroBatch, PlannedTeacher, Workload, kv_cache_bytes

MemoryPhase = Literal["always", "training", "generation", "scoring", "update", "step"]
"""training: in all phases but generation."""
MEMORY_PHASES: tuple[MemoryPhase, ...] = ("generation", "scoring", "update", "step")


@dataclass(frozen=True)
class MemoryPart:
    """Some bytes of a role, and the phase in which they are allocated."""

    role: Literal["student", "teacher", "rollout"]
    name: str
    bytes: float
    phase: MemoryPhase


_student, _rollout, _teacher = (partial(MemoryPart, role) for role in ("student", "rollout", "teacher"))


@dataclass(frozen=True)
class GpuMemory:
    """The memory of a GPU of one pipeline stage. reserve: bytes for CUDA, NCCL and fragmentation."""

    stage: int
    parts: tuple[MemoryPart, ...]
    reserve: float

    def of(self, phase: MemoryPhase) -> float:
        """Return the bytes that a phase adds, or (always) that stay."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    def active_phases(self, phase: MemoryPhase) -> list[MemoryPhase]:
        """Return the phases whose parts are allocated during `phase`; only those that have any."""
        phases: list[MemoryPhase] = ["always", phase] if phase == "generation" else ["always", "training", phase]
        return [each for each in phases if any(part.phase == each for part in self.parts)]

    def at(self, phase: MemoryPhase) -> float:
        """Return the bytes during a phase, with the reserve."""
        return self.reserve + sum(map(self.of, self.active_phases(phase)))

    @property
    def fullest(self) -> MemoryPhase:
        """The phase that needs most."""
        return max(MEMORY_PHASES, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes during the fullest phase, with the reserve."""
        return self.at(self.fullest)

    @property
    def largest(self) -> MemoryPart:
        """The largest part during the fullest phase."""
        active = self.active_phases(self.fullest)
        return max((part for part in self.parts if part.phase in active), key=lambda part: part.bytes)


def weight_bytes(parameters: ParameterCounts, element: int) -> float:
    return parameters.total * element


def gradient_bytes(parameters: ParameterCounts) -> float:
    """Return the bytes of Megatron's fp32 gradient buffer; its padding is left out."""
    return parameters.total * FP32_BYTES


def moment_bytes(parameters: ParameterCounts, layout: PlannedLayout, *, distributed: bool) -> float:
    """Return the bytes of AdamW's two fp32 moments; distributed over the ranks that hold the same weights."""
    if not distributed:
        return parameters.total * 2 * FP32_BYTES
    dense_copies = layout.data_parallel * layout.context_parallel
    return 2 * FP32_BYTES * (parameters.dense / dense_copies + parameters.expert / layout.expert_data_parallel)


def main_parameter_bytes(
    parameters: ParameterCounts, layout: PlannedLayout, element: int, *, distributed: bool
) -> float:
    """Return the bytes of the optimizer's fp32 copies of weights that are not fp32; distributed as the moments are."""
    return moment_bytes(parameters, layout, distributed=distributed) / 2 if element < FP32_BYTES else 0.0


def checkpoint_host_bytes(
    parameters: ParameterCounts, layout: PlannedLayout, element: int, *, distributed: bool
) -> float:
    """Return what a checkpoint in the background takes of host memory, on a rank that writes weights and states."""
    states = moment_bytes(parameters, layout, distributed=distributed)
    states += main_parameter_bytes(parameters, layout, element, distributed=distributed)
    return weight_bytes(parameters, element) + states


@dataclass(frozen=True)
class StudentGpus:
    """A student's GPUs: student, rollouts and, in the same layout, colocated teachers.

    writer: who generates. server: bytes that a colocated server takes while it generates, and (process) all the time.
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
        """Return the memory of the stage that needs most."""
        stages = [self.stage(i) for i in range(self.layout.pipeline_parallel)]
        return max(stages, key=lambda memory: memory.peak)

    def stage(self, stage: int) -> GpuMemory:
        parts = [*self._student_parts(stage), *self._rollout_parts(stage), *self._teacher_parts(stage)]
        return GpuMemory(stage, tuple(part for part in parts if part.bytes), self.reserve)

    @property
    def _activations(self) -> Activations:
        return Activations(self.student, self.layout, self.work.student_element, self.path, self.work.recompute)

    def _student_parts(self, stage: int) -> Iterator[MemoryPart]:
        work, layout, element = self.work, self.layout, self.work.student_element
        held, distributed = self.student.rank_parameters(layout, stage), work.distributed_optimizer
        batch, count = work.micro_batch(layout), work.micro_batches(layout)
        yield _student("weights", weight_bytes(held, element), "always")
        # megatron/offload.py lends this memory to colocated servers
        phase: MemoryPhase = "training" if self.writer == "colocated servers" else "always"
        copies = main_parameter_bytes(held, layout, element, distributed=distributed)
        yield _student("gradients (fp32)", gradient_bytes(held), phase)
        yield _student("main parameters", copies, phase)
        moments = moment_bytes(held, layout, distributed=distributed)
        yield _student("Adam's moments", moments, "step" if work.offloaded_moments else phase)
        yield _student("activations", self._activations.peak(batch, stage, count), "update")
        yield _student("backward's workspace", self._activations.workspace(batch), "update")
        if stage == layout.pipeline_parallel - 1:
            yield _student("objective", self._objective(batch), "update")

    def _objective(self, batch: PlannedMicroBatch) -> float:
        """Return a micro-batch's bytes: fp32 gradient of the output layer, tiles of logits, hidden states twice.

        A tile has fp32 logits, the teacher's too for hidden states, and their gradient in the weights' precision.
        """
        work, shape, element = self.work, self.student, self.work.student_element
        rows, columns = work.response_rows(batch, self.layout), _vocab_columns(self.student, self.layout)
        hidden = rows * shape.hidden * element
        signals = {teacher.signal for teacher in self.teachers}
        logits = hidden + rows * columns * (2 * element + 2.5) if "logits" in signals else 0.0
        if signals == {"logits"}:
            return logits
        tile_bytes = FP32_BYTES * (2 if "hidden" in signals else 1) + (element if element < FP32_BYTES else 0)
        tiles = min(GPU_TILE_ELEMENTS, rows * columns) * tile_bytes
        head = columns * shape.hidden * (FP32_BYTES + element)
        linear = 2 * hidden + rows * shape.hidden * FP32_BYTES + tiles + head
        return max(logits, linear + rows * MAX_EXCHANGE_BYTES_PER_TOKEN * self.layout.tensor_parallel)

    def _rollout_parts(self, stage: int) -> Iterator[MemoryPart]:
        work, layout, element, shape = self.work, self.layout, self.work.student_element, self.student
        if self.writer == "colocated servers":
            yield _rollout("server: weights and cache", self.server, "generation")
            yield _rollout("servers: CUDA and NCCL", self.process, "always")
        if self.writer != "trainer":
            return
        sequences, layers = work.generated(layout), len(layout.layers_of(stage, shape.layers))
        tokens = sequences * work.longest_prompt * layout.context_parallel  # decoding does not split them
        cache = sequences * work.longest * kv_cache_bytes(shape, layers, layout, element)
        yield _rollout("key-value cache", cache, "generation")
        workspace = self._activations.workspace(PlannedMicroBatch(tokens, tokens))
        yield _rollout("prompts' workspace", workspace, "generation")
        yield _rollout("logits", sequences * shape.vocab * (element + 3 * FP32_BYTES), "generation")

    def _teacher_parts(self, stage: int) -> Iterator[MemoryPart]:
        """Yield the weights of all teachers and the largest of what each needs to score: they score in turns."""
        last = stage == self.layout.pipeline_parallel - 1
        for teacher in self.teachers:
            head = _vocab_columns(self.student, self.layout) * teacher.shape.hidden * teacher.element
            if teacher.colocated and not teacher.offloaded:
                yield _teacher("weights", teacher.weights(self.layout, stage, self.student.vocab), "always")
            elif last and teacher.signal != "topk":
                yield _teacher("output layer", head, "update" if teacher.colocated else "always")
        yield from _largest(list(self._scoring(each, stage)) for each in self.teachers if each.colocated)
        yield from _largest([self._payload(teacher, last)] for teacher in self.teachers)

    def _scoring(self, teacher: PlannedTeacher, stage: int) -> Iterator[MemoryPart]:
        if teacher.offloaded:
            weights = teacher.weights(self.layout, stage, self.student.vocab)
            yield _teacher("weights, else in host memory", weights, "scoring")
        yield from _scoring_parts(teacher, self.layout, self.work, self.path)

    def _payload(self, teacher: PlannedTeacher, last: bool) -> MemoryPart:
        """Return the teacher payload on the GPU: of the iteration, one update, or (remote teacher) one micro-batch."""
        work, layout = self.work, self.layout
        if teacher.signal == "topk":
            tokens = -(-work.prompts // layout.data_parallel) * work.longest_response
            per_token = (INDEX_BYTES + FP32_BYTES) * teacher.top_k + 2 * FP32_BYTES
            return _teacher("top-k of the iteration", tokens * per_token, "update")
        if teacher.colocated:
            rows = work.samples(layout) * work.longest_response / layout.context_parallel
            return _teacher("hidden states of an update", rows * teacher.bytes_per_token, "update")
        rows = work.response_rows(work.micro_batch(layout), layout) if last else 0.0
        return _teacher("hidden states of a micro-batch", rows * teacher.bytes_per_token, "update")


def _largest(choices: Iterable[list[MemoryPart]]) -> list[MemoryPart]:
    return max(choices, key=lambda parts: sum(part.bytes for part in parts), default=[])


def _vocab_columns(shape: ModelShape, layout: PlannedLayout) -> float:
    return padded_vocab_size(shape.vocab, layout.tensor_parallel) / layout.tensor_parallel


def _scoring_parts(
    teacher: PlannedTeacher, layout: PlannedLayout, work: Workload, path: LayerPath = "fused"
) -> Iterator[MemoryPart]:
    """Yield what a teacher's forward pass over a micro-batch needs besides its weights."""
    batch = work.micro_batch(layout)
    workspace = Activations(teacher.shape, layout, teacher.element, path).workspace(batch)
    yield _teacher("workspace", workspace, "scoring")
    if teacher.signal == "topk":
        logits = min(LOGITS_CHUNK_ELEMENTS, work.response_rows(batch, layout) * _vocab_columns(teacher.shape, layout))
        yield _teacher("logits, a part at a time", logits * 2 * FP32_BYTES, "scoring")


def remote_teacher_memory(teacher: PlannedTeacher, work: Workload, reserve: float, limit: float) -> GpuMemory:
    """Return the memory of the fullest GPU of a teacher on GPUs of `limit` bytes of its own.

    SGLang (served) fills its share with weights and KV cache; a separate teacher has weights and a forward pass.
    """
    layout = teacher.layout
    if teacher.placement == "served":
        weights = _teacher("weights", teacher.weights(layout, 0), "always")
        share = teacher.mem_fraction_static * limit
        cache = _teacher("key-value cache", max(0.0, share - weights.bytes), "always")
        return GpuMemory(0, (weights, cache), limit - share)
    memories = []
    for stage in range(layout.pipeline_parallel):
        parts = [_teacher("weights", teacher.weights(layout, stage), "always"), *_scoring_parts(teacher, layout, work)]
        if teacher.signal == "hidden":
            rows = work.micro_batch(layout).tokens / layout.context_parallel
            parts.append(_teacher("hidden states", rows * teacher.bytes_per_token, "scoring"))
        memories.append(GpuMemory(stage, tuple(parts), reserve))
    return max(memories, key=lambda memory: memory.peak)
