"""Inputs for the objective's tests, with the traps in them, and the comparison with the dense fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import Objective, TeacherLogits, TeacherTopK, TokenLosses, entropy_aware_loss
from eaopd_megatron.objective.dense_reference import dense_loss

LAYOUTS = ("even", "padded", "empty_rank")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1e-2}
TOP_K = 5


@dataclass(frozen=True)
class Case:
    """A micro-batch over the whole padded vocabulary, [n, padded], before it is cut into shards."""

    vocab_size: int
    student: Tensor
    teacher: Tensor
    tokens: Tensor
    teacher_tokens: Tensor
    old_logprobs: Tensor
    upstream: Tensor

    def threshold(self) -> float:
        """A gate threshold in the middle, away from every entropy, so that rounding opens no gate."""
        log_p = self.teacher[:, : self.vocab_size].double().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).sort().values
        middle = entropy[len(entropy) // 4 : -(len(entropy) // 4)]
        widest = int((middle[1:] - middle[:-1]).argmax())
        return float(middle[widest] + middle[widest + 1]) / 2

    def top_k(self, dtype: torch.dtype, *, columns: int = TOP_K + 2, entropy: bool = True) -> TeacherTopK:
        """What a server that scores with these logits sends; the probabilities are those of fp64."""
        logits = self.teacher[:, : self.vocab_size].double()
        log_p = logits.log_softmax(1)
        ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :columns]
        return TeacherTopK(
            ids,
            log_p.gather(1, ids).to(dtype),
            log_p.gather(1, self.teacher_tokens[:, None])[:, 0].to(dtype),
            -(log_p.exp() * log_p).sum(1).to(dtype) if entropy else None,
        )


def make_case(
    *, ranks: int = 1, layout: str = "padded", dtype: torch.dtype = torch.float64, n: int = 24, seed: int = 0
) -> Case:
    """Padding holds NaN, so that any use of it shows; ids 0 and vocab_size - 1 are sampled, and 0 is in S of every
    third row.

    The old log-probs are off by up to 1 in either direction, so that the clip acts on both sides for either advantage.
    With bf16 the logits tie in every row, at the k-th place too.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size, padded = sizes(ranks, layout)

    def logits(spread: Tensor) -> Tensor:
        return torch.randn(n, padded, generator=generator, dtype=torch.float64) * spread + 3

    spread = torch.linspace(0.5, 4, n, dtype=torch.float64)[:, None]
    teacher, student = logits(spread), logits(spread.flip(0))
    teacher[::3, 0] = teacher[::3, :vocab_size].amax(1) - 0.25
    if dtype == torch.bfloat16:
        teacher = (teacher * 2).round() / 2
    return complete(student.to(dtype), teacher.to(dtype), vocab_size, generator)


def sizes(ranks: int, layout: str) -> tuple[int, int]:
    """True and padded vocabulary of a layout."""
    columns = 12 if ranks > 1 else 48
    padded = columns * ranks
    if ranks == 1:
        return padded if layout == "even" else padded - 5, padded
    return {"even": padded, "padded": padded - 5, "empty_rank": padded - columns - 3}[layout], padded


def complete(student: Tensor, teacher: Tensor, vocab_size: int, generator: torch.Generator) -> Case:
    """The case of given logits [n, padded]: tokens, old log-probs, upstream gradient, and NaN in the padding."""
    n, dtype = student.shape[0], student.dtype
    tokens = torch.randint(0, vocab_size, (n,), generator=generator)
    tokens[:3] = torch.tensor([0, vocab_size - 1, 0])[:n]
    teacher_tokens = torch.where(torch.arange(n) % 5 == 0, (tokens + 7) % vocab_size, tokens)
    log_q = student[:, :vocab_size].double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    offset = torch.tensor([-0.9, 0.05, 0.9, -0.05, 0.3, -0.3]).repeat(n // 6 + 1)[:n]
    old = (log_q - offset).clamp(max=-1e-3)
    numbers = torch.float32 if dtype == torch.bfloat16 else dtype
    upstream = torch.randn(n, generator=generator).to(numbers)
    upstream[4 % max(n, 1) : 5] = 0
    for value in (student, teacher):
        value[:, vocab_size:] = torch.nan
    return Case(vocab_size, student, teacher, tokens, teacher_tokens, old.to(numbers), upstream)


def shard_of(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's columns, as new memory."""
    if group is None:
        return value.clone()
    return value.chunk(group.size(), dim=1)[group.rank()].clone()


def run(
    case: Case,
    objective: Objective,
    signal: str,
    group: ProcessGroup | None,
    *,
    chunk: int | None = 7,
    old: bool = True,
    teacher: TeacherTopK | None = None,
    **arguments: Any,
) -> tuple[TokenLosses, Tensor]:
    """The call on this rank's shard and its gradient [n, columns] under the case's upstream gradient.

    Fails where the call changes one of its inputs.
    """
    student = shard_of(case.student, group).requires_grad_()
    if signal == "logits":
        logits = shard_of(case.teacher, group)
        served: TeacherLogits | TeacherTopK = TeacherLogits(logits)
        given = {"teacher": logits}
    else:
        served = top = teacher or case.top_k(case.old_logprobs.dtype)
        given = {"ids": top.ids, "logprobs": top.logprobs, "token_logprob": top.token_logprob}
    given |= {"student": student, "tokens": case.tokens, "old": case.old_logprobs, "upstream": case.upstream}
    with unchanged(given):
        out = entropy_aware_loss(
            student,
            served,
            case.tokens,
            case.old_logprobs if old else None,
            teacher_tokens=case.teacher_tokens,
            objective=objective,
            vocab_size=case.vocab_size,
            group=group,
            chunk=chunk,
            **arguments,
        )
        out.loss.backward(case.upstream.to(out.loss.dtype))
    assert student.grad is not None
    return out, student.grad


@contextmanager
def unchanged(given: dict[str, Tensor]) -> Iterator[None]:
    """Fails where the body changes one of the tensors."""
    before = {name: value.detach().clone() for name, value in given.items()}
    yield
    for name, value in given.items():
        same = torch.equal(value.detach().nan_to_num(nan=1e9), before[name].nan_to_num(nan=1e9))
        assert same, f"the call changed {name}"


def oracle(
    case: Case, objective: Objective, signal: str, *, old: bool = True, teacher: TeacherTopK | None = None
) -> tuple[Any, Tensor]:
    """The dense oracle in fp64 and its gradient [n, padded], zero in the padding."""
    return dense(case, objective, case.student, case.teacher if signal == "logits" else None, old, teacher)


def dense(
    case: Case,
    objective: Objective,
    student: Tensor,
    teacher: Tensor | None,
    old: bool,
    top_k: TeacherTopK | None,
) -> tuple[Any, Tensor]:
    """The oracle on logits [n, padded] of either side, or on top_k (None: the case's own); values and gradient."""
    student = student.double().clone().requires_grad_()
    if teacher is not None:
        served: TeacherLogits | TeacherTopK = TeacherLogits(teacher.double())
    else:
        known = top_k or case.top_k(case.old_logprobs.dtype)
        served = replace(
            known,
            logprobs=known.logprobs.double(),
            token_logprob=known.token_logprob.double(),
            entropy=None if known.entropy is None else known.entropy.double(),
        )
    out = dense_loss(
        student,
        served,
        case.tokens,
        case.old_logprobs.double() if old else None,
        teacher_tokens=case.teacher_tokens,
        objective=objective,
        vocab_size=case.vocab_size,
    )
    out.loss.backward(case.upstream.double())
    assert student.grad is not None
    return out, student.grad


def assert_near(name: str, got: Tensor, want: Tensor, tolerance: float, *, scale: Tensor | None = None) -> None:
    """Refuse errors above ``tolerance`` of the largest wanted value, or the largest of ``scale``."""
    if got.dtype == torch.bool:
        assert torch.equal(got, want), f"{name}: {got.tolist()}, expected {want.tolist()}"
        return
    assert got.isfinite().all(), f"{name}: not finite"
    error = (got.double() - want.detach()).abs().max().item() if got.numel() else 0.0
    scale = want if scale is None else scale
    limit = tolerance * (scale.detach().abs().max().item() if scale.numel() else 0.0)
    assert error <= limit + 1e-12, f"{name}: off by {error:.3g}, allowed {limit:.3g}"


def compare(case: Case, objective: Objective, signal: str, group: ProcessGroup | None, **arguments: Any) -> Any:
    """Values and gradient of the call against the oracle; returns the oracle's values.

    bf16 inputs are computed in fp32, so that only the gradient, which is bf16, has bf16's error.
    """
    out, gradient = run(case, objective, signal, group, **arguments)
    known = {name: value for name, value in arguments.items() if name in ("old", "teacher")}
    want, dense_gradient = oracle(case, objective, signal, **known)
    values = TOLERANCE[case.old_logprobs.dtype]
    assert out.loss.dtype == case.old_logprobs.dtype and gradient.dtype == case.student.dtype
    for name in vars(want):
        assert_near(name, getattr(out, name), getattr(want, name), values)
    wanted = dense_gradient if group is None else dense_gradient.chunk(group.size(), dim=1)[group.rank()]
    first = 0 if group is None else group.rank() * gradient.shape[1]
    valid = min(max(case.vocab_size - first, 0), gradient.shape[1])
    # The scale is that of the whole gradient, since a rank may own columns where it is tiny.
    error = (gradient[:, :valid].double() - wanted[:, :valid]).abs().max().item() if valid else 0.0
    limit = TOLERANCE[case.student.dtype] * dense_gradient.abs().max().item()
    assert gradient.isfinite().all(), "the gradient is not finite"
    assert error <= limit + 1e-12, f"gradient: off by {error:.3g}, allowed {limit:.3g}"
    assert not gradient[:, valid:].any(), "a padded column has a gradient"
    return want
