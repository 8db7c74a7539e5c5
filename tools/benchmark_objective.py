"""What the objective costs, in one run: collectives, bytes and time of our calls beside others.

    python tools/benchmark_objective.py [--tokens 256 1024] [--vocab 151936] [--hidden 1024] [--dtype bf16] [--ranks 2]
                                        [--repeats 5] [--json FILE] [--plot FILE.png]

Bytes are per token · vocabulary column of a rank, beyond the student's logits; for the linear forms MiB beyond hidden
states, heads, their gradients and one fp32 sum of the head's gradient. Times are the least of the repeats, which take
turns; the ratio is to Megatron-Core's own cross entropy on the same logits (for the linear forms: to a linear layer and
that cross entropy), forward and backward. A size's rows are printed when it is done; what would not fit into memory is
left out by name, and plain PyTorch is measured at the first size alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import psutil
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed import parallel_state as groups
from eaopd_megatron.launch import local_ranks as launch
from eaopd_megatron.launch.entrypoint import run_entrypoint
from eaopd_megatron.objective import (
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    entropy_aware_loss,
    linear_entropy_aware_loss,
    summarise_teacher,
)
from eaopd_megatron.utils.lifetime import die_with_parent
from eaopd_megatron.utils.log import log_rank0
from tools.lib.live_bytes import LiveBytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather",
    "reduce_scatter_tensor",
    "broadcast",
)


def megatron_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss [n] (nats) of targets [n] under this rank's logits [n, vocab/tp], by Megatron-Core."""
    return vocab_parallel_cross_entropy(logits[None], targets[None])[0]


@dataclass(frozen=True)
class Case:
    """Inputs of one size on this rank. Logits [n, V/tp], hidden states [n, h], heads [V/tp, h]."""

    vocab: int
    group: dist.ProcessGroup
    tokens: torch.Tensor
    student_head: torch.Tensor
    teacher_head: torch.Tensor
    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor

    @classmethod
    def make(cls, n: int, vocab: int, hidden: int, dtype: torch.dtype, parallel: groups.ParallelState) -> Case:
        shared = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(1 + parallel.tp_rank)
        columns = vocab // parallel.tp_size
        heads = [torch.randn(columns, hidden, generator=own).mul_(3 / hidden**0.5).to(dtype) for _ in range(2)]
        states = [torch.randn(n, hidden, generator=shared).to(dtype) for _ in range(2)]
        # of two tokens in three the teacher is sure, as real teachers are: their gate is closed
        sure = torch.arange(n) % 3 > 0
        peaks = heads[1][torch.randint(columns, (n,), generator=shared)] * 2
        dist.broadcast(peaks, parallel.tp_src_rank(), group=parallel.tp_group)
        states[1][sure] = peaks[sure]
        tokens = torch.randint(vocab, (n,), generator=shared)
        parts = [tokens, *heads, *states]
        return cls(vocab, parallel.tp_group, *(part.to(parallel.device) for part in parts))

    def top_k(self) -> TeacherTopK:
        """The teacher's top 16, made in parts."""
        parts = [
            summarise_teacher(state @ self.teacher_head.T, tokens, k=16, vocab_size=self.vocab, group=self.group)
            for state, tokens in zip(self.teacher_hidden.split(1024), self.tokens.split(1024), strict=True)
        ]
        names = ("ids", "logprobs", "token_logprob", "entropy")
        return TeacherTopK(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def logits(self, side: str) -> torch.Tensor:
        """[n, V/tp] of "student" or "teacher"."""
        return getattr(self, f"{side}_hidden") @ getattr(self, f"{side}_head").T


@dataclass(frozen=True)
class Subject:
    """One implementation. loss(student logits, teacher logits), or, linear: loss(hidden states, head), is [n]."""

    name: str
    linear: bool
    loss: Callable[..., torch.Tensor]
    inplace: bool = False  # it makes the logits that it may write over itself

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return "entropy_aware_loss" in self.name

    def leaves(self, case: Case) -> list[torch.Tensor]:
        """Fresh inputs that want a gradient."""
        inputs = (case.student_hidden, case.student_head) if self.linear else (case.logits("student"),)
        return [value.clone().requires_grad_() for value in inputs]


@dataclass(frozen=True)
class Figures:
    """A subject at one size. peak, kept: bytes per token · column of a rank (linear forms: MiB); seconds."""

    subject: str
    tokens: int
    collectives_forward: int
    collectives_backward: int
    peak: float
    kept: float
    forward: float
    backward: float
    ratio: float | None  # where the yardstick fits


def subjects(case: Case) -> list[Subject]:
    """The yardsticks first, of each kind."""
    exact, paper = Objective.preset("eopd_exact"), Objective.preset("eopd")
    gated = Objective(reverse_kl="sampled", forward_kl="exact")
    known = case.top_k()
    common: dict[str, Any] = {"vocab_size": case.vocab, "group": case.group}

    def ours(objective: Objective, *, top_k: bool = False, inplace: bool = False) -> Callable[..., torch.Tensor]:
        def loss(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            said = known if top_k else TeacherLogits(teacher)
            activation = logits * 1 if inplace else logits  # what is written over must be no leaf
            options = common | {"objective": objective, "inplace_backward": inplace}
            return entropy_aware_loss(activation, said, case.tokens, None, **options).loss

        return loss

    def linear(objective: Objective, *, top_k: bool = False) -> Callable[..., torch.Tensor]:
        def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            said = known if top_k else TeacherHidden(case.teacher_hidden, case.teacher_head)
            return linear_entropy_aware_loss(hidden, head, said, case.tokens, None, objective=objective, **common).loss

        return loss

    def plain(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        log_q, log_p = logits.float().log_softmax(1), teacher.float().log_softmax(1)
        q, p = log_q.exp(), log_p.exp()
        entropy = -(p * log_p).sum(1)
        return (q * (log_q - log_p)).sum(1) + (entropy > exact.threshold) * (p * (log_p - log_q)).sum(1)

    found = [
        Subject("Megatron-Core cross entropy", False, lambda x, _: megatron_cross_entropy(x, case.tokens)),
        Subject("entropy_aware_loss eopd_exact", False, ours(exact)),
        Subject("entropy_aware_loss eopd_exact, gradient over the logits", False, ours(exact, inplace=True), True),
        Subject("entropy_aware_loss sampled + gated exact", False, ours(gated)),
        Subject("entropy_aware_loss eopd (top-k)", False, ours(paper, top_k=True)),
        Subject(
            "linear + Megatron-Core cross entropy", True, lambda h, w: megatron_cross_entropy(h @ w.T, case.tokens)
        ),
        Subject("linear_entropy_aware_loss eopd_exact", True, linear(exact)),
        Subject("linear_entropy_aware_loss eopd (top-k)", True, linear(paper, top_k=True)),
    ]
    if dist.get_world_size(case.group) == 1:  # these know no shards
        found.insert(1, Subject("plain PyTorch eopd_exact", False, plain))
        if case.tokens.is_cuda and importlib.util.find_spec("liger_kernel"):
            found.append(Subject("liger-kernel fused linear JSD", True, liger(case)))
    return found


def liger(case: Case) -> Callable[..., torch.Tensor]:
    """liger-kernel's fused linear JSD (beta 0.5, a mean over tokens): another divergence of like cost; CUDA only."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    fused = module.LigerFusedLinearJSD(jsd_beta=0.5)

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return fused(hidden, head, case.teacher_hidden, case.teacher_head, None)

    return loss


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the collectives that are called inside."""
    seen: list[str] = []
    before = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    depth = [0]

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                seen.append(name)
            depth[0] += 1
            try:
                return call(*args, **kwargs)
            finally:
                depth[0] -= 1

        return counting

    for name, call in before.items():
        setattr(dist, name, wrap(name, call))
    try:
        yield seen
    finally:
        for name, call in before.items():
            setattr(dist, name, call)


def timed(subject: Subject, case: Case) -> tuple[float, float]:
    """Seconds forward and backward, once."""
    inputs = subject.leaves(case) + ([] if subject.linear else [case.logits("teacher")])

    def now() -> float:
        if case.tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    loss = subject.loss(*inputs)
    middle = now()
    loss.sum().backward()
    return middle - start, now() - middle


def weighed(subject: Subject, case: Case) -> tuple[int, int, float, float]:
    """Collectives forward and backward; bytes at the peak and kept for backward, per token · column.

    The teacher's logits count: they are made inside and are the loss's alone. Hidden states, heads, their gradients and
    one fp32 sum of the head's gradient do not; what the linear forms need beyond them is in MiB.
    """
    leaves = subject.leaves(case)
    with counted() as seen, LiveBytes(*leaves, case.teacher_hidden, case.teacher_head) as memory:
        loss = subject.loss(*leaves) if subject.linear else subject.loss(*leaves, case.logits("teacher"))
        forward, kept = len(seen), memory.now()
        loss.sum().backward()
    if subject.linear:
        gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
        sums = 4 * case.student_head.numel() if subject.ours else 0
        return forward, len(seen) - forward, (memory.peak - gradients - sums) / 2**20, kept / 2**20
    own, unit = (leaves[0].nbytes if subject.inplace else 0), leaves[0].numel()
    return forward, len(seen) - forward, (memory.peak - own) / unit, (kept - own) / unit


def needed(subject: Subject, case: Case) -> int:
    """Bytes that a subject takes at the most, roughly, beyond the case itself."""
    if subject.linear and subject.ours:
        return 12 * case.student_head.numel()
    return (32 if "plain" in subject.name else 12) * len(case.tokens) * len(case.student_head)


def fitting(case: Case, plain: bool) -> list[Subject]:
    """The subjects to measure at one size; those without the memory are named."""
    free = torch.cuda.mem_get_info()[0] if case.tokens.is_cuda else psutil.virtual_memory().available
    found = []
    for subject in subjects(case):
        if "plain" in subject.name and not plain:
            continue
        if needed(subject, case) < free / dist.get_world_size():
            found.append(subject)
        elif dist.get_rank() == 0:
            gigabytes = needed(subject, case) / 1e9
            log_rank0(f"{len(case.tokens)} tokens: {subject.name} left out, it needs about {gigabytes:.0f} GB a rank")
    return found


def measure(case: Case, repeats: int, plain: bool) -> list[Figures]:
    """All subjects that fit at one size; the repeats take turns, so that a slow moment hits everyone."""
    group = fitting(case, plain)
    weights = [weighed(subject, case) for subject in group]
    times: list[list[tuple[float, float]]] = [[] for _ in group]
    for _ in range(repeats):
        for subject, seconds in zip(group, times, strict=True):
            seconds.append(timed(subject, case))
    best = [(min(f for f, _ in seconds), min(b for _, b in seconds)) for seconds in times]
    floor = {subject.linear: sum(b) for subject, b in zip(group, best, strict=True) if "cross entropy" in subject.name}
    return [
        Figures(
            subject.name,
            len(case.tokens),
            *weight,
            *seconds,
            sum(seconds) / floor[subject.linear] if subject.linear in floor else None,
        )
        for subject, weight, seconds in zip(group, weights, best, strict=True)
    ]


def memory(f: Figures, value: float) -> str:
    return f"{max(0.0, value):.0f} MiB" if "linear" in f.subject else f"{value:.2f} B"


HEAD = (
    "| call | tokens | collectives forward / backward | peak | kept | forward ms | backward ms | time ratio |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(f: Figures) -> str:
    """A line of the Markdown table."""
    return (
        f"| {f.subject} | {f.tokens} | {f.collectives_forward} / {f.collectives_backward} "
        f"| {memory(f, f.peak)} | {memory(f, f.kept)} "
        f"| {1e3 * f.forward:.0f} | {1e3 * f.backward:.0f} | {'-' if f.ratio is None else f'{f.ratio:.2f}'} |"
    )


def plot(figures: Sequence[Figures], path: Path) -> None:
    """Time ratio and peak bytes over the number of tokens."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.5), layout="constrained")
    axes = picture.subplots(1, 2)
    for axis, name, label in zip(
        axes, ("ratio", "peak"), ("time / Megatron-Core cross entropy", "peak bytes / (token · column)"), strict=True
    ):
        for subject in dict.fromkeys(f.subject for f in figures):
            found = [(f.tokens, getattr(f, name)) for f in figures if f.subject == subject]
            points = [(tokens, value) for tokens, value in found if value is not None]
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), marker="o", label=subject)
        axis.set(xscale="log", xlabel="tokens", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    picture.savefig(path, dpi=120)


def run(options: argparse.Namespace) -> None:
    """One rank."""
    parallel, _ = groups.init_distributed(ParallelLayout(options.ranks))
    torch.set_num_threads(1)
    figures: list[Figures] = []
    if parallel.is_main:
        what = f"vocabulary {options.vocab}, hidden {options.hidden}, {options.ranks} ranks, {parallel.device}"
        print(f"{options.dtype}, {what}\n\n{HEAD}", flush=True)
    for n in options.tokens:
        case = Case.make(n, options.vocab, options.hidden, DTYPES[options.dtype], parallel)
        found = measure(case, options.repeats, plain=not figures)
        figures += found
        if parallel.is_main:
            print("\n".join(map(row, found)), flush=True)
    if parallel.is_main:
        if options.json:
            options.json.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")
        if options.plot:
            plot(figures, options.plot)
    groups.shutdown_distributed()


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="what the objective costs", allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--ranks", type=int, default=1, help="tensor-parallel ranks; times of several are not comparable on few cores"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if not launch.is_started_rank():
        return launch.launch_ranks(arguments, options.ranks, command=(sys.executable, str(Path(__file__).resolve())))
    return run_entrypoint(lambda: run(options))


if __name__ == "__main__":
    die_with_parent()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
