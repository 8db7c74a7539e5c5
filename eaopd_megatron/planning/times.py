"""Data-sheet numbers of GPUs, model FLOPs, and estimated seconds of an iteration, which only rank layouts.

Each estimate rests on `TimeAssumptions`; none was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eaopd_megatron.errors import UserError
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.memory import moment_bytes
from eaopd_megatron.planning.workload import GPUS_PER_HOST, PlannedLayout, PlannedServers, Workload, kv_cache_bytes

GiB = 2**30
_BACKWARD = 2  # products with the transposed weights and with the transposed inputs, for each forward one
_HEAD_PASSES = 2 + _BACKWARD  # the objective computes its tiles of logits twice
_COLLECTIVE_SECONDS = 20e-6  # of a small one
_OPTIMIZER_BYTES = 30  # read and written per parameter: gradient, three fp32 states twice, the weight


@dataclass(frozen=True)
class GpuSpec:
    """A GPU as its maker describes it; links in bytes per second and direction."""

    name: str
    memory: float  # GiB
    peak: float  # dense bf16 FLOP/s
    bandwidth: float  # of its memory, bytes per second
    host_link: float  # to the GPUs of its host
    network: float  # its share of the way to other hosts
    processor: float  # to its host's memory


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuSpec("a100", 80, 312e12, 2.04e12, 300e9, 25e9, 25e9),
        GpuSpec("h100", 80, 989e12, 3.35e12, 450e9, 50e9, 50e9),
        GpuSpec("h200", 141, 989e12, 4.8e12, 450e9, 50e9, 50e9),
        GpuSpec("b200", 180, 2250e12, 8.0e12, 900e9, 50e9, 50e9),
    )
}


def find_gpu(name: str) -> GpuSpec:
    """Return one of GPUS by its short name or CUDA's ("NVIDIA H100 80GB HBM3"). Raises UserError if unknown."""
    words = name.lower().replace("-", " ").split()
    for known, gpu in GPUS.items():
        if known in words:
            return gpu
    raise UserError(f"--gpu {name}: unknown; known are {', '.join(GPUS)}")


@dataclass(frozen=True)
class TimeAssumptions:
    """Shares and times that no formula gives. Every estimate of time depends on them."""

    training_mfu: float = 0.40  # of the peak, in products of forward and backward
    scoring_mfu: float = 0.50  # forward only
    expert_factor: float = 0.6  # on both, for a model with experts: its products are smaller
    bandwidth_share: float = 0.70  # of the memory's, in decoding and in the optimizer
    link_share: float = 0.70  # of a link's
    decode_layer: float = 0.5e-3  # seconds per layer and decoded token at least, launched one by one
    graph_layer: float = 0.05e-3  # the same in a CUDA graph, on a server
    response_share: float = 0.5  # mean response over the longest allowed
    prompt_share: float = 0.25  # mean prompt over the longest allowed
    reserve: float = 5.0  # GiB for CUDA, NCCL, libraries and fragmentation
    server_process: float = 3.0  # GiB that a colocated server keeps while the trainer runs
    server_context: float = 0.5  # GiB on the first GPU for each other rank of the colocated servers

    def lines(self, gpu: GpuSpec) -> Sequence[str]:
        """Return the assumptions in words."""
        links = f"{gpu.host_link / 1e9:.0f} within a host, {gpu.network / 1e9:.0f} between hosts"
        memory = f"memory {gpu.bandwidth / 1e12:.2f} TB/s; GB/s: {links}, {gpu.processor / 1e9:.0f} to host memory"
        mfu = f"{self.training_mfu:.0%} of the peak in training, {self.scoring_mfu:.0%} in scoring"
        shares = f"{self.bandwidth_share:.0%} of the memory's bandwidth, {self.link_share:.0%} of links'"
        decoding = (
            f"{self.decode_layer * 1e3:g} ms per layer and token in process, {self.graph_layer * 1e3:g} on a server"
        )
        reserve = f"{self.reserve:g} GiB per GPU for CUDA, NCCL and fragmentation"
        servers = f"{self.server_process:g} more, and {self.server_context:g} on the first GPU for each of the others"
        return (
            f"{gpu.name}: {gpu.peak / 1e12:.0f} TFLOP/s bf16, {memory}",
            f"{mfu} (x{self.expert_factor:g} with experts); {shares}, no overlap",
            f"mean prompt: {self.prompt_share:.0%}, mean response: {self.response_share:.0%} of the longest allowed",
            "the longest response of a batch is the longest allowed; experts get equal numbers of tokens",
            f"decoding takes at least {decoding}",
            f"{reserve}; a colocated server keeps {servers}",
        )


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass: the layers' matrices, attention, output layer."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def forward_flops(shape: ModelShape, context_length: float) -> ForwardFlops:
    """Return the mean FLOPs per token of a causal sequence of `context_length` tokens."""
    mlp = 3 * shape.hidden * shape.intermediate
    if shape.experts:
        mlp = shape.hidden * (shape.experts + 3 * shape.expert_intermediate * shape.experts_per_token)
    attention = shape.hidden * (2 * shape.query_width + 2 * shape.kv_width)
    weights = shape.layers * (attention + mlp)
    keys = (context_length + 1) / 2
    return ForwardFlops(2 * weights, 4 * shape.layers * shape.query_width * keys, 2 * shape.hidden * shape.vocab)


def flops_per_token(shape: ModelShape, context_length: float, *, training: bool = False) -> float:
    """Return the model FLOPs per token of a sequence: forward, or (training) forward and backward.

    The output layer is counted for every token; activation recompute is not counted.
    """
    return forward_flops(shape, context_length).total * (1 + _BACKWARD if training else 1)


def model_flops_utilization(flops: float, seconds: float, gpus: int, peak: float) -> float:
    """Return FLOPs of all GPUs over what `gpus` GPUs of `peak` FLOP/s could have done in `seconds`."""
    return flops / (seconds * gpus * peak)


@dataclass(frozen=True)
class TimeEstimates:
    """Seconds of an iteration's phases, for one workload and kind of GPU."""

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
        """Estimate decoding in process, one token per step until the longest response ends; stages run in turn."""
        work, together = self.work, self.work.generated(layout)
        batches = -(-work.prompts // (layout.generating_replicas * together))
        step = self._decode_step(shape, layout, together, self.assumed.decode_layer)
        return batches * (
            work.longest_response * step
            + self.scoring(shape, layout, together * (self.sequence - self.response), head=False)
        )

    def served(self, shape: ModelShape, servers: PlannedServers, limit: float) -> float:
        """Estimate generation by servers on GPUs of `limit` bytes; a response that ends makes room for the next."""
        work, layout = self.work, servers.layout
        each = -(-work.prompts // servers.count)
        room = servers.cached_tokens(shape, work.student_element, limit) / self.sequence
        together = max(1, min(servers.max_concurrent_requests, each, int(room)))
        step = self._decode_step(shape, layout, together, self.assumed.graph_layer)
        steps = max(work.longest_response, each * self.response / together)
        return steps * step + self.scoring(shape, layout, each * (self.sequence - self.response), head=False)

    def _decode_step(self, shape: ModelShape, layout: PlannedLayout, together: int, layer_seconds: float) -> float:
        """Estimate one token of `together` sequences; at least `layer_seconds` per layer."""
        work, element = self.work, self.work.student_element
        counts = shape.hf_parameters()
        read = counts.dense / layout.tensor_parallel
        if shape.experts:  # the share of experts that some token is routed to
            routed = 1 - (1 - shape.experts_per_token / shape.experts) ** together
            read += counts.expert * routed / (layout.expert_tensor_parallel * layout.expert_parallel)
        length = work.longest_prompt + work.longest_response / 2
        cache = together * length * kv_cache_bytes(shape, shape.layers, layout, element)
        seconds = (read * element + cache) / (self.gpu.bandwidth * self.assumed.bandwidth_share)
        latency = 2 * shape.layers * _COLLECTIVE_SECONDS if layout.tensor_parallel > 1 else 0.0
        return max(seconds + latency, shape.layers * layer_seconds)  # launches run ahead of the GPU

    def scoring(
        self, shape: ModelShape, layout: PlannedLayout, tokens: float, *, head: bool = True, element: int | None = None
    ) -> float:
        """Estimate a forward pass over `tokens` tokens of each data-parallel copy. element: bytes of an activation."""
        flops = forward_flops(shape, self.sequence)
        head_flops = flops.head * tokens * self.response / self.sequence if head else 0.0
        count = max(1, round(tokens / self.work.micro_batch_tokens))
        layers = tokens * (flops.layers + flops.attention)
        compute = self._compute(shape, layout, layers, head_flops, count, self.assumed.scoring_mfu)
        return compute + self.sent(traffic.forward_traffic(shape, layout, tokens, element or self.work.student_element))

    def fetched(self, count: float) -> float:
        """Estimate the copy of `count` bytes from host memory to a GPU."""
        return count / (self.gpu.processor * self.assumed.link_share)

    def update(self, shape: ModelShape, layout: PlannedLayout) -> float:
        """Estimate forward and backward of a mini-batch, and its share of recomputing π_old's log-probs."""
        work, tokens = self.work, self.tokens(layout)
        rows = tokens * self.response / self.sequence
        flops = forward_flops(shape, self.sequence)
        passes = 1 + _BACKWARD + (work.recompute == "full")
        layers, head = passes * tokens * (flops.layers + flops.attention), _HEAD_PASSES * rows * flops.head
        count = work.micro_batches(layout, self.sequence)
        seconds = self._compute(shape, layout, layers, head, count, self.assumed.training_mfu)
        seconds += self.sent(traffic.training_traffic(shape, layout, tokens, rows, work.student_element))
        return seconds + (self.scoring(shape, layout, tokens) if work.updates > 1 else 0.0)

    def step(self, shape: ModelShape, layout: PlannedLayout) -> float:
        """Estimate the reduction of the gradients and the optimizer's step."""
        held, distributed = shape.rank_parameters(layout, 0), self.work.distributed_optimizer
        own = held.total / (layout.data_parallel * layout.context_parallel if distributed else 1)
        touched = own * _OPTIMIZER_BYTES / (self.gpu.bandwidth * self.assumed.bandwidth_share)
        moved = 2 * moment_bytes(held, layout, distributed=distributed) if self.work.offloaded_moments else 0.0
        return touched + self.fetched(moved) + self.sent(self.reduction(shape, layout))

    def reduction(self, shape: ModelShape, layout: PlannedLayout) -> list[traffic.TrafficFlow]:
        """Return the traffic of an update's gradients."""
        held, work = shape.rank_parameters(layout, 0), self.work
        tied = shape.vocab * shape.hidden // layout.tensor_parallel if shape.tied else 0
        return traffic.gradient_traffic(
            held, layout, work.student_element, distributed=work.distributed_optimizer, tied_rows=tied
        )

    def tokens(self, layout: PlannedLayout) -> float:
        """Return the tokens of an update in the data-parallel copy that has most samples."""
        return self.work.samples(layout) * self.sequence

    def sent(self, flows: Iterable[traffic.TrafficFlow]) -> float:
        """Estimate what a GPU sends, one kind after the other, each over the slowest link of its group."""
        links = ((flow, self.gpu.host_link if flow.span <= GPUS_PER_HOST else self.gpu.network) for flow in flows)
        return sum(flow.bytes / (link * self.assumed.link_share) for flow, link in links)

    def _compute(
        self, shape: ModelShape, layout: PlannedLayout, layers: float, head: float, micro_batches: int, mfu: float
    ) -> float:
        speed = self.gpu.peak * mfu * (self.assumed.expert_factor if shape.experts else 1)
        ranks = layout.tensor_parallel * layout.context_parallel
        stage = (layers / layout.pipeline_parallel + head) / ranks / speed
        bubble = (layout.pipeline_parallel - 1) / (micro_batches * layout.virtual_pipeline)  # idle over working time
        return stage * (1 + bubble)
