"""Refusals of bad input. Each names the argument and the first bad row, and is raised by every rank of the group alike.

They look only at what is the same on all ranks: replicated arguments, and statistics that were reduced already. A rank
that raised alone would leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLACK = 1e-3  # nats or probability by which rounding may exceed a limit
NEGATIVE_ENTROPY = -1e-4  # nats; rounding gives -1e-6 for a teacher that is sure


def require_shape(name: str, value: Tensor, shape: tuple[int | None, ...], of: str) -> None:
    """Refuse a tensor of another shape (None: any size); ``of`` says what sets the shape."""
    fits = value.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("k" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: shape {list(value.shape)}, expected [{wanted}] as {of}")


def require_matrix(name: str, value: Tensor, shape: str) -> None:
    """Refuse what is no matrix of floating-point numbers."""
    if value.dim() != 2 or not value.dtype.is_floating_point:
        raise ValueError(f"{name}: {value.dtype} of shape {list(value.shape)}, expected floating point {shape}")


def require_integers(name: str, value: Tensor) -> None:
    """Refuse ids that are no whole numbers."""
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise ValueError(f"{name}: {value.dtype}, expected int64 ids")


class Checks:
    """Collects conditions on rows and reads them back together, so that a GPU waits once."""

    def __init__(self) -> None:
        self._bad: list[tuple[Tensor, Callable[[int], str]]] = []

    def refuse(self, bad: Tensor, message: Callable[[int], str]) -> None:
        """Refuse where ``bad`` [n] or [n, k] holds; ``message(row)`` is the line for the first bad row."""
        self._bad.append((bad.flatten(1).any(1) if bad.dim() > 1 else bad, message))

    def refuse_ids(self, name: str, ids: Tensor, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary."""

        def message(row: int) -> str:
            found = [i for i in ids[row].flatten().tolist() if not 0 <= i < vocab_size]
            return f"{name}: id {found[0]} in row {row} is outside the vocabulary of {vocab_size}"

        self.refuse((ids < 0) | (ids >= vocab_size), message)

    def refuse_logprobs(self, name: str, values: Tensor) -> None:
        """Refuse NaN and probabilities above 1."""
        self.refuse(~(values <= SLACK), lambda row: f"{name}: row {row} holds {_shown(values, row)}, no log-prob")

    def refuse_broken(self, name: str, broken: Tensor) -> None:
        """Refuse logits without a softmax."""
        self.refuse(broken, lambda row: f"{name}: row {row} holds NaN or +inf, or nothing but -inf")

    def refuse_top_k(self, logprobs: Tensor, ids: Tensor, vocab_size: int) -> None:
        """Refuse top-k log-probs [n, k] that are no part of a distribution over the vocabulary."""
        name = "teacher.logprobs"
        self.refuse_ids("teacher.ids", ids, vocab_size)
        ordered = ids.sort(1).values
        self.refuse(
            ordered[:, 1:] == ordered[:, :-1],
            lambda row: f"teacher.ids: row {row} names an id twice: {ids[row].tolist()}",
        )
        self.refuse(logprobs.isnan(), lambda row: f"{name}: row {row} holds NaN")
        total = logprobs.double().exp().sum(1)
        self.refuse(
            total > 1 + SLACK,
            lambda row: (
                f"{name}: the probabilities of row {row} sum to {total[row].item():.6g}, "
                "so they are not normalised over the whole vocabulary"
            ),
        )
        self.refuse(total == 0, lambda row: f"{name}: row {row} has no probability at all")

    def refuse_entropy(self, name: str, entropy: Tensor) -> None:
        """Refuse negative entropies and NaN."""
        self.refuse(
            ~(entropy >= NEGATIVE_ENTROPY), lambda row: f"{name}: row {row} holds {entropy[row].item():.6g}, no entropy"
        )

    def run(self) -> None:
        """Raise ValueError for the first of the conditions, as they were given, that holds; then forget them."""
        given, self._bad = self._bad, []
        if not given or not bool(torch.stack([bad.any() for bad, _ in given]).any()):
            return
        for bad, message in given:
            rows = bad.nonzero()
            if len(rows):
                raise ValueError(message(int(rows[0])))


def _shown(values: Tensor, row: int) -> str:
    return " ".join(f"{value:.6g}" for value in values[row].flatten().tolist())
