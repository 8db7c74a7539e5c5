"""From what the ranks know of each token to its loss, its measures and the recipe of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .checks import Checks, require_integers, require_shape
from .evidence import Evidence
from .gradient import Recipe
from .settings import Objective
from .terms import combine, gate_of
from .vocab_parallel import Shard


@dataclass(frozen=True)
class TokenLosses:
    """Each [n] and the same on every rank. ``loss`` carries the gradient, the rest is detached. Entropies, KLs: nats.

    reverse_kl is exact where the teacher's whole distribution is given, else the sampled estimate log q(y) - log p(y).
    forward_kl is the objective's; where it has none, the exact one if the teacher's whole distribution is given, else
    the top-k one. teacher_entropy is the lower bound where only top-k log-probs without an entropy are given;
    gate_ambiguous (bool) says that the bounds leave a hard gate open to doubt. clipped (bool): the ratio's clip stops
    the gradient.
    """

    loss: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    gate: Tensor
    gate_ambiguous: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """log q(y) and the entropy of each token, [n] nats, the same on every rank."""

    logprob: Tensor
    entropy: Tensor


def check_tokens(checks: Checks, count: int, vocab_size: int, **ids: Tensor | None) -> None:
    """Refuse ids [count] of another kind or shape, and those outside the vocabulary."""
    for name, value in ids.items():
        if value is not None:
            require_integers(name, value)
            require_shape(name, value, (count,), "the student has rows")
            checks.refuse_ids(name, value, vocab_size)


def check_old_logprobs(checks: Checks, count: int, old_logprobs: Tensor | None) -> None:
    """Refuse old log-probs of another shape, and such that are none."""
    if old_logprobs is not None:
        require_shape("old_logprobs", old_logprobs, (count,), "the student has rows")
        checks.refuse_logprobs("old_logprobs", old_logprobs)


def judge(
    objective: Objective, seen: Evidence, shard: Shard, tokens: Tensor, old_logprobs: Tensor | None, *, careful: bool
) -> tuple[TokenLosses, Recipe]:
    """Losses that carry no gradient yet, and the recipe of that gradient. careful: the logits hold -inf."""
    gate, ambiguous = gate_of(objective, seen.teacher_entropy, seen.entropy_upper)
    combined = combine(
        objective,
        gate=gate,
        student_logprob=seen.student_logprob,
        teacher_logprob=seen.teacher_logprob,
        old_logprobs=None if old_logprobs is None else old_logprobs.detach().to(gate.dtype),
        student=seen.student,
        teacher=seen.teacher,
        gaps=seen.gaps,
        kept=seen.kept,
    )
    recipe = Recipe(
        shard=shard,
        student=seen.student,
        teacher=seen.teacher,
        coefficients=combined.coefficients,
        tokens=tokens,
        kept_ids=None if seen.kept is None else seen.kept.ids,
        careful=careful,
    )
    losses = TokenLosses(
        loss=combined.loss,
        teacher_entropy=seen.teacher_entropy,
        student_entropy=seen.student.entropy,
        forward_kl=combined.forward_kl,
        reverse_kl=combined.reverse_kl,
        gate=gate,
        gate_ambiguous=ambiguous,
        student_logprob=seen.student_logprob,
        teacher_logprob=seen.teacher_logprob,
        clipped=combined.clipped,
    )
    return losses, recipe
