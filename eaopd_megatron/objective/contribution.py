"""What a shard of the vocabulary knows of each token: a rank's shard, or a block of its columns.

A contribution is a dictionary of [r, n] numbers. Contributions of shards that lie side by side `join` into that of
their union, so that blocks join into a rank's and the ranks' into that of the whole vocabulary:

    student, teacher            [3]     m, Z, A
    gap                         [2]     G_s, G_t
    asked, teacher_token        [a, 1]  logits under given ids, 0 where the shard does not hold the id
    ids, student_ids, teacher_ids [k]   the shard's k best ids by the teacher's logit, and both logits under them
    student_rest, teacher_rest  [1]     Z without S, or without the shard's k best where S is to be found
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .top_k import first_k, shard_top_k
from .vocab_parallel import Shard, Softmax, look_up, merge, merge_gap, partial_sums

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What a shard is asked besides its sums."""

    asked: Tensor  # [n, a] ids under which the student's logits are wanted, the sampled token first
    teacher_token: Tensor | None = None  # [n] id under which the teacher's logit is wanted, where there are logits
    k: int = 0  # size of the set S to be found in the teacher's logits; 0: none
    tail: bool = False  # whether the probability outside S is wanted; S is asked[:, 1:] where it is not to be found

    def of(self, tokens: slice) -> Wanted:
        """The same for some of the tokens."""
        token = None if self.teacher_token is None else self.teacher_token[tokens]
        return replace(self, asked=self.asked[tokens], teacher_token=token)


def contribution(
    student: Tensor, teacher: Tensor | None, shard: Shard, wanted: Wanted, *, finite: bool = False
) -> tuple[Rows, bool]:
    """From logits [n, columns] of the shard; also whether they hold -inf. finite: see `partial_sums`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    if teacher is not None:
        dtype = torch.promote_types(dtype, teacher.dtype)
    left_out = wanted.asked[:, 1:]
    candidates: Rows = {}
    if wanted.k and teacher is not None:
        left_out, _ = shard_top_k(teacher, shard, wanted.k)
        real = (left_out < shard.vocab_size).T
        candidates["ids"] = left_out.T.to(dtype)
        candidates["student_ids"] = torch.where(real, look_up(student, shard, left_out, dtype), -torch.inf)
        candidates["teacher_ids"] = torch.where(real, look_up(teacher, shard, left_out, dtype), -torch.inf)
    leave_out = shard.locate(left_out) if wanted.tail else None
    rows, careful = partial_sums(student, teacher, shard, dtype=dtype, leave_out=leave_out, finite=finite)
    rows["asked"] = look_up(student, shard, wanted.asked, dtype)
    if teacher is not None and wanted.teacher_token is not None:
        rows["teacher_token"] = look_up(teacher, shard, wanted.teacher_token[:, None], dtype)
    return rows | candidates, careful


def join(parts: Rows) -> Rows:
    """The contribution of the union of shards: name -> [shards, r, n] becomes name -> [r, n]."""
    student, alpha, delta = merge(parts["student"])
    whole = {"student": _stacked(student), "asked": parts["asked"].sum(0)}
    sides = {"student": (student, alpha)}
    if "teacher" in parts:
        teacher, alpha_t, delta_t = merge(parts["teacher"])
        sides["teacher"] = teacher, alpha_t
        growth = delta - delta_t
        gap = (
            merge_gap(parts["gap"][:, 0], parts["student"][:, 1], alpha, growth),
            merge_gap(parts["gap"][:, 1], parts["teacher"][:, 1], alpha_t, growth),
        )
        whole |= {
            "teacher": _stacked(teacher),
            "gap": torch.stack(gap),
            "teacher_token": parts["teacher_token"].sum(0),
        }
    rests = (
        {name: (weight * parts[f"{name}_rest"][:, 0]).sum(0) for name, (_, weight) in sides.items()}
        if ("student_rest" in parts)
        else {}
    )
    if "ids" in parts:
        k = parts["ids"].shape[1]
        names = ("ids", "student_ids", "teacher_ids")
        values = {name: parts[name].permute(2, 0, 1).flatten(1) for name in names}
        order = first_k(values["teacher_ids"], values["ids"], values["ids"].shape[1])
        best, others = order[:, :k], order[:, k:]
        for name in rests:
            # What no shard counted as a candidate, and the candidates that were not taken: nothing is subtracted.
            left = values[f"{name}_ids"].gather(1, others) - sides[name][0].maximum[:, None]
            rests[name] = rests[name] + left.exp().sum(1)
        whole |= {name: value.gather(1, best).T for name, value in values.items()}
    return whole | {f"{name}_rest": rest[None] for name, rest in rests.items()}


def _stacked(softmax: Softmax) -> Tensor:
    return torch.stack([softmax.maximum, softmax.total, softmax.weighted])
