"""Input validation. Errors name the argument and the first bad row, and are raised by every rank of the group.

Checks read only what is equal on all ranks: replicated arguments and reduced statistics. A rank that raised alone would
leave the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TOLERANCE = 1e-3  # nats or probability by which rounding may exceed a bound
_MIN_ENTROPY = -1e-4  # nats; rounding gives -1e-6 for a one-hot distribution


def require_shape(name: str, value: Tensor, shape: tuple[int | None, ...], reference: str) -> None:
    """Raise ValueError unless `value` has this shape (None: any size); `reference` names what determines it."""
    matches = value.dim() == len(shape) and all(
        expected is None or expected == actual for expected, actual in zip(shape, value.shape, strict=True)
    )
    if not matches:
        expected = ", ".join("k" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {list(value.shape)}, expected [{expected}] as {reference}")


def require_matrix(name: str, value: Tensor, shape: str) -> None:
    """Raise ValueError unless `value` is a floating-point matrix."""
    if value.dim() != 2 or not value.dtype.is_floating_point:
        raise ValueError(f"{name}: {value.dtype} of shape {list(value.shape)}, expected floating point {shape}")


def require_integers(name: str, value: Tensor) -> None:
    """Raise ValueError unless ids are integers."""
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise ValueError(f"{name}: {value.dtype}, expected int64 ids")


class InputChecks:
    """Collect per-row conditions and evaluate them together, so that a GPU is synchronised once."""

    def __init__(self) -> None:
        self._conditions: list[tuple[Tensor, Callable[[int], str]]] = []

    def refuse(self, bad: Tensor, message: Callable[[int], str]) -> None:
        """Refuse rows where `bad` [n] or [n, k] holds; message(row) is the error for the first of them."""
        self._conditions.append((bad.flatten(1).any(1) if bad.dim() > 1 else bad, message))

    def raise_first(self) -> None:
        """Raise ValueError for the first condition that holds, in the order they were added, and clear all."""
        conditions, self._conditions = self._conditions, []
        if not conditions or not bool(torch.stack([bad.any() for bad, _ in conditions]).any()):
            return
        for bad, message in conditions:
            rows = bad.nonzero()
            if len(rows):
                raise ValueError(message(int(rows[0])))

    def tokens(self, shape: tuple[int], vocab_size: int, reference: str, **ids: Tensor | None) -> None:
        """Refuse token ids of another type or shape (which `reference` determines), and ids outside the vocabulary."""
        for name, value in ids.items():
            if value is not None:
                require_integers(name, value)
                require_shape(name, value, shape, reference)
                self.refuse_ids(name, value, vocab_size)

    def old_logprobs(self, num_tokens: int, old_logprobs: Tensor | None) -> None:
        """Refuse log pi_old(y) of another shape, NaN and values above 0."""
        if old_logprobs is not None:
            require_shape("old_logprobs", old_logprobs, (num_tokens,), "the student has rows")
            self.refuse_logprobs("old_logprobs", old_logprobs)

    def refuse_ids(self, name: str, ids: Tensor, vocab_size: int) -> None:

        def message(row: int) -> str:
            outside = [i for i in ids[row].flatten().tolist() if not 0 <= i < vocab_size]
            return f"{name}: id {outside[0]} in row {row} is outside the vocabulary of {vocab_size}"

        self.refuse((ids < 0) | (ids >= vocab_size), message)

    def refuse_logprobs(self, name: str, values: Tensor) -> None:
        """Refuse NaN and log-probs above 0."""
        self.refuse(
            ~(values <= _TOLERANCE), lambda row: f"{name}: row {row} holds {values[row].item():.6g}, no log-prob"
        )

    def refuse_non_finite(self, name: str, has_nan_or_inf: Tensor) -> None:
        """Refuse logits whose softmax is undefined."""
        self.refuse(has_nan_or_inf, lambda row: f"{name}: row {row} holds NaN or +inf, or nothing but -inf")

    def refuse_top_k(self, logprobs: Tensor, ids: Tensor, vocab_size: int) -> None:
        """Refuse top-k log-probs [n, k] that cannot belong to a distribution over the vocabulary."""
        name = "teacher.logprobs"
        self.refuse_ids("teacher.ids", ids, vocab_size)
        ordered = ids.sort(1).values
        self.refuse(
            ordered[:, 1:] == ordered[:, :-1],
            lambda row: f"teacher.ids: row {row} names an id twice: {ids[row].tolist()}",
        )
        self.refuse(logprobs.isnan(), lambda row: f"{name}: row {row} holds NaN")
        mass = logprobs.double().exp().sum(1)
        self.refuse(
            mass > 1 + _TOLERANCE,
            lambda row: (
                f"{name}: the probabilities of row {row} sum to {mass[row].item():.6g}, "
                "so they are not normalised over the whole vocabulary"
            ),
        )
        self.refuse(mass == 0, lambda row: f"{name}: row {row} has no probability at all")

    def refuse_entropy(self, name: str, entropy: Tensor) -> None:
        """Refuse negative entropies and NaN."""
        self.refuse(
            ~(entropy >= _MIN_ENTROPY), lambda row: f"{name}: row {row} holds {entropy[row].item():.6g}, no entropy"
        )
