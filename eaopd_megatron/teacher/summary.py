"""Top-k, entropy and log p(y) of a micro-batch's response tokens from the teacher's hidden states."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist

from eaopd_megatron.megatron.forward import logits_by_parts
from eaopd_megatron.objective import TeacherTopK, summarise_teacher


def summarise_rows(
    rows: torch.Tensor,
    head: torch.Tensor,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    top_k: int,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> TeacherTopK:
    """Of rows [n, h] under head [V_padded/tp, h]. Logits are made a part at a time.

    tokens [n]; labels [n]: ids under which log p(y) is looked up, where they differ from the tokens. Collective over
    the tensor-parallel group.
    """
    found = [
        summarise_teacher(
            logits,
            tokens[part],
            k=top_k,
            vocab_size=vocab_size,
            group=group,
            teacher_tokens=None if labels is None else labels[part],
        )
        for part, logits in logits_by_parts(rows, head)
    ]
    joined = {field.name: torch.cat([getattr(part, field.name) for part in found]) for field in fields(TeacherTopK)}
    return TeacherTopK(**joined)
