"""torch's `varlen_attn` without CUDA: sequence by sequence, a run's last query aligned with its last key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


def attention_of_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor
) -> torch.Tensor:
    """[T, heads, d]: causal, each run of queries on its run of keys, in the inputs' dtype."""
    parts = []
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    ends = zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], cu_seq_k.tolist(), cu_seq_k.tolist()[1:], strict=False)
    for first_q, last_q, first_k, last_k in ends:
        q, k, v = query[first_q:last_q], key[first_k:last_k], value[first_k:last_k]
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    return torch.cat(parts)


def emulated_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch 2.12 has it, as far as it is used; refuses what the kernel refuses."""
    assert cu_seq_k is not None and window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    for x, ends, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
        assert x.stride(-1) == 1 and len(x) == ends[-1] and 0 <= ends.diff().min() <= ends.diff().max() <= longest
    return attention_of_runs(query, key, value, cu_seq_q, cu_seq_k)


@contextlib.contextmanager
def emulated() -> Iterator[mock.Mock]:
    """Variable-length attention on any device and dtype; yields what stands for torch's function."""
    stands = mock.create_autospec(emulated_varlen_attn, side_effect=emulated_varlen_attn)
    with (
        mock.patch("eaopd_megatron.megatron.layers.varlen_refusal", lambda *unused: None),
        mock.patch("torch.nn.attention.varlen.varlen_attn", stands),
    ):
        yield stands
