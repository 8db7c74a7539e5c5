"""Estimated seconds of an iteration's phases. Each rests on `hardware.Assumptions`; none was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.hardware import GpuSpec, TimeAssumptions
from eaopd_megatron.planning.layouts import GPUS_PER_HOST, PlannedLayout
from eaopd_megatron.planning.memory import PlannedServers, kv_cache_bytes, moment_bytes
from eaopd_megatron.planning.workload import Workload

BACKWARD = 2  # products with the transposed weights and with the transposed inputs, for each forward one


@dataclass(frozen=True)
class ForwardFlops:
    """Of one token, forward."""

    layers: float  # the layers' matrices
    attention: float  # queries with keys, and probabilities with values
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def forward_flops(shape: ModelShape, context_length: float) -> ForwardFlops:
    """Of a token of a causal sequence of context_length tokens, on average: it attends to half of them."""
    mlp = 3 * shape.hidden * shape.intermediate
    if shape.experts:
        mlp = shape.hidden * (shape.experts + 3 * shape.expert_intermediate * shape.experts_per_token)
    weights = shape.layers * (shape.attention_weights + mlp)
    keys = (context_length + 1) / 2
    return ForwardFlops(2 * weights, 4 * shape.layers * shape.query_width * keys, 2 * shape.hidden * shape.vocab)


def flops_per_token(shape: ModelShape, context_length: float, *, training: bool = False) -> float:
    """Model FLOPs of a token of a sequence of context_length tokens: forward, or (training) forward and backward.

    shape: `ModelShape.of(config)`. Every token is counted with the output layer; activation recompute is not counted.
    """
    return forward_flops(shape, context_length).total * (1 + BACKWARD if training else 1)


def model_flops_utilization(flops: float, seconds: float, gpus: int, peak: float) -> float:
    """Model FLOPs utilisation: FLOPs of all GPUs in so many seconds over what gpus · peak (FLOP/s) could have done."""
    return flops / (seconds * gpus * peak)


COLLECTIVE = 20e-6  # seconds that a small one takes
OPTIMIZER_BYTES = 30  # read and written of a parameter: gradient, three fp32 states twice, the weight
HEAD_PASSES = 2 + BACKWARD  # the objective makes its tiles of logits twice


@dataclass(frozen=True)
class TimeEstimates:
    """Estimates for one pair of models, workload and kind of GPU."""

    gpu: GpuSpec
    assumed: TimeAssumptions
    work: Workload

    @property
    def response(self) -> float:
        """Tokens of a mean response."""
        return self.assumed.response_share * self.work.longest_response

    @property
    def sequence(self) -> float:
        """Tokens of a mean prompt and response."""
        return self.assumed.prompt_share * self.work.longest_prompt + self.response

    def generation(self, shape: ModelShape, layout: PlannedLayout) -> float:
        """Decoding in process, one token a step until the longest response ends; stages work one after the other."""
        work, assumed = self.work, self.assumed
        together = work.generated(layout)
        batches = -(-work.prompts // (layout.generating_replicas * together))
        step = self._decoded(shape, layout, together, assumed.decode_layer)
        prompts = together * assumed.prompt_share * work.longest_prompt
        return batches * (work.longest_response * step + self.scoring(shape, layout, prompts, head=False))

    def served(self, shape: ModelShape, servers: PlannedServers, limit: float) -> float:
        """Generation by servers whose GPUs have so many bytes: a response that ends makes room for the next one."""
        work, layout = self.work, servers.layout
        each = -(-work.prompts // servers.count)
        room = servers.cached_tokens(shape, work.student_element, limit) / self.sequence
        together = max(1, min(servers.max_running, each, int(room)))
        step = self._decoded(shape, layout, together, self.assumed.graph_layer)
        steps = max(work.longest_response, each * self.response / together)
        prompts = each * self.assumed.prompt_share * work.longest_prompt
        return steps * step + self.scoring(shape, layout, prompts, head=False)

    def _decoded(self, shape: ModelShape, layout: PlannedLayout, together: int, least: float) -> float:
        """A token of so many sequences. least: seconds of a layer."""
        work, assumed, element = self.work, self.assumed, self.work.student_element
        whole = shape.hf_parameters()
        read = whole.dense / layout.tensor_parallel
        if shape.experts:
            met = (
                1 - (1 - shape.experts_per_token / shape.experts) ** together
            )  # share of the experts that some token meets
            read += whole.expert * met / (layout.expert_tensor_parallel * layout.expert_parallel)
        length = work.longest_prompt + work.longest_response / 2
        cache = together * length * kv_cache_bytes(shape, shape.layers, layout, element)
        seconds = (read * element + cache) / (self.gpu.bandwidth * assumed.bandwidth_share)
        latency = 2 * shape.layers * COLLECTIVE if layout.tensor_parallel > 1 else 0.0
        return max(seconds + latency, shape.layers * least)  # launches run ahead of the GPU

    def scoring(
        self, shape: ModelShape, layout: PlannedLayout, tokens: float, *, head: bool = True, element: int | None = None
    ) -> float:
        """A forward pass over so many tokens of each data-parallel copy. element: bytes of an activation; none: the
        student's."""
        flops = forward_flops(shape, self.sequence)
        head_flops = flops.head * tokens * self.response / self.sequence if head else 0.0
        count = max(1, round(tokens / self.work.micro_batch_tokens))
        compute = self._compute(shape, layout, tokens * (flops.layers + flops.attention), head_flops, count, "scoring")
        return compute + self.sent(traffic.forward_traffic(shape, layout, tokens, element or self.work.student_element))

    def fetched(self, weights: float) -> float:
        """So many bytes from host memory to a GPU."""
        return weights / (self.gpu.processor * self.assumed.link_share)

    def update(self, shape: ModelShape, layout: PlannedLayout) -> float:
        """Forward and backward of a mini-batch with its objective, and π_old's share where it is recomputed."""
        work = self.work
        tokens = self.tokens(layout)
        rows = tokens * self.response / self.sequence
        flops = forward_flops(shape, self.sequence)
        passes = 1 + BACKWARD + (work.recompute == "full")
        layers = passes * tokens * (flops.layers + flops.attention)
        count = work.micro_batches(layout, self.sequence)
        seconds = self._compute(shape, layout, layers, HEAD_PASSES * rows * flops.head, count, "training")
        seconds += self.sent(traffic.training_traffic(shape, layout, tokens, rows, work.student_element))
        if work.updates > 1:
            seconds += self.scoring(shape, layout, tokens)
        return seconds

    def step(self, shape: ModelShape, layout: PlannedLayout) -> float:
        """Reduce the gradients and apply them."""
        held = shape.rank_parameters(layout, 0)
        distributed = self.work.distributed_optimizer
        own = held.total / (layout.data_parallel * layout.context_parallel if distributed else 1)
        touched = own * OPTIMIZER_BYTES / (self.gpu.bandwidth * self.assumed.bandwidth_share)
        moved = 2 * moment_bytes(held, layout, distributed=distributed) if self.work.offloaded_moments else 0.0
        return touched + self.fetched(moved) + self.sent(self.reduction(shape, layout))

    def reduction(self, shape: ModelShape, layout: PlannedLayout) -> list[traffic.TrafficFlow]:
        """Of an update's gradients."""
        tied = shape.vocab * shape.hidden // layout.tensor_parallel if shape.tied else 0
        return traffic.gradient_traffic(
            shape.rank_parameters(layout, 0),
            layout,
            self.work.student_element,
            distributed=self.work.distributed_optimizer,
            tied_rows=tied,
        )

    def tokens(self, layout: PlannedLayout) -> float:
        """Of an update, in the data-parallel copy that has most samples."""
        return self.work.samples(layout) * self.sequence

    def sent(self, flows: Iterable[traffic.TrafficFlow]) -> float:
        """Seconds for what a GPU sends, one kind after the other."""
        share = self.assumed.link_share
        return sum(flow.bytes / (self.gpu.link(flow.span, GPUS_PER_HOST) * share) for flow in flows)

    def _compute(
        self, shape: ModelShape, layout: PlannedLayout, layers: float, head: float, micro_batches: int, kind: str
    ) -> float:
        reached = self.assumed.training_mfu if kind == "training" else self.assumed.scoring_mfu
        speed = self.gpu.peak * reached * (self.assumed.expert_factor if shape.experts else 1)
        matrices = layout.tensor_parallel * layout.context_parallel
        stage = (layers / layout.pipeline_parallel + head) / matrices / speed
        return stage * (1 + layout.bubble(micro_batches))
