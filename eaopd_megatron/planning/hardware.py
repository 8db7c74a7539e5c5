"""GPUs' data-sheet numbers, and what is assumed to be reached of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eaopd_megatron.errors import UserError

GiB = 2**30


@dataclass(frozen=True)
class GpuSpec:
    """A GPU as its maker describes it; links are bytes a second and direction."""

    name: str
    memory: float  # GiB
    peak: float  # dense bf16 FLOP/s
    bandwidth: float  # of its memory, bytes a second
    host_link: float  # to the GPUs of its host
    network: float  # its share of the way to other hosts
    processor: float  # to its host's memory

    def link(self, span: int, per_host: int) -> float:
        """The slowest link in a group whose ranks lie within so many consecutive GPUs."""
        return self.host_link if span <= per_host else self.network


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
    """One of GPUS, by its short name or by the name that CUDA gives ("NVIDIA H100 80GB HBM3"). UserError else."""
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
    expert_factor: float = 0.6  # both, for a model with experts: its products are smaller
    bandwidth_share: float = 0.70  # of the memory's, in decoding and in the optimiser
    link_share: float = 0.70  # of a link's
    decode_layer: float = 0.5e-3  # seconds a layer and decoded token at least, launched one by one
    graph_layer: float = 0.05e-3  # the same in a CUDA graph, on a server
    response_share: float = 0.5  # mean response over the longest allowed
    prompt_share: float = 0.25  # the same of prompts
    reserve: float = 5.0  # GiB for CUDA, NCCL, libraries and fragmentation
    server_process: float = 3.0  # GiB that a colocated server keeps in the trainer's turn

    def lines(self, gpu: GpuSpec) -> Sequence[str]:
        """In words."""
        return (
            f"{gpu.name}: {gpu.peak / 1e12:.0f} TFLOP/s bf16, memory {gpu.bandwidth / 1e12:.2f} TB/s; GB/s: "
            f"{gpu.host_link / 1e9:.0f} in a host, {gpu.network / 1e9:.0f} between hosts, "
            f"{gpu.processor / 1e9:.0f} to its memory",
            f"reached: {self.training_mfu:.0%} of the peak in training, {self.scoring_mfu:.0%} in scoring "
            f"(x{self.expert_factor:g} with experts)",
            f"reached: {self.bandwidth_share:.0%} of the memory's bandwidth, {self.link_share:.0%} of links'; "
            "nothing overlaps with computation",
            f"mean prompt: {self.prompt_share:.0%}, mean response: {self.response_share:.0%} of the longest allowed",
            "the longest response of a batch is the longest allowed",
            f"decoding takes at least {self.decode_layer * 1e3:g} ms a layer and token in process, "
            f"{self.graph_layer * 1e3:g} on a server",
            f"{self.reserve:g} GiB a GPU for CUDA, NCCL and fragmentation; "
            f"a colocated server keeps {self.server_process:g} more",
            "experts get equal numbers of tokens",
        )
