"""torch's variable-length attention over packed sequences: flash attention on CUDA, without padding."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch

_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class VarlenSegments:
    """Pairs of a run of queries and a run of keys; a run's last query attends to all keys of its pair, and so on back.

    cu_seqlens_q, cu_seqlens_k  [pairs + 1] int32: 0 and the end of each run
    max_seqlen_q, max_seqlen_k  upper bounds of their lengths
    key_rows                    rows that the runs of keys are made of; None: the keys as they are
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_rows: torch.Tensor | None = None

    @classmethod
    def of_context_rank(
        cls, cu_seqlens: torch.Tensor, longest: int, size: int, rank: int, key_order: torch.Tensor
    ) -> VarlenSegments:
        """Return the segments of one context-parallel rank, which computes chunks r and 2·size−1−r of each sequence.

        A chunk's queries attend to all keys up to the chunk's end. cu_seqlens [b + 1]: the ends of whole sequences, the
        longest being `longest`; key_order [T]: the packed position of each gathered key.
        """
        ends = cu_seqlens.long()
        chunks = ends.diff() // (2 * size)
        seen = torch.tensor([rank + 1, 2 * size - rank], device=ends.device)  # chunks up to the end of each
        queries, keys = chunks.repeat_interleave(2), (chunks[:, None] * seen).flatten()
        cu_q, cu_k = (torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) for lengths in (queries, keys))
        starts = ends[:-1].repeat_interleave(2) - cu_k[:-1]
        positions = torch.arange(int(cu_k[-1]), device=ends.device) + starts.repeat_interleave(keys)
        row_of = torch.empty_like(key_order).index_copy(0, key_order, torch.arange(len(key_order), device=ends.device))
        chunk = longest // (2 * size)
        return cls(cu_q.int(), cu_k.int(), chunk, chunk * (2 * size - rank), row_of[positions])


def varlen_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why `varlen_attention` cannot run on such tensors, or None where it can."""
    if device.type != "cuda":
        return "no CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} heads"
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return f"heads of {head_dim}"
    if not _has_varlen_attn():
        return f"torch {torch.__version__} has none; 2.10 has"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "a GPU older than Ampere"
    return None


@functools.cache
def _has_varlen_attn() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: VarlenSegments
) -> torch.Tensor:
    """Return attention [T, heads, d] of query [T, heads, d] to key and value [T', groups, d], causal per segment."""
    if segments.key_rows is not None:
        key, value = (x.index_select(0, segments.key_rows) for x in (key, value))
    return _torch_varlen_attn(query, key, value, segments)


def _torch_varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: VarlenSegments
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    lengths = (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k)
    options = _options(inspect.signature(varlen_attn), grouped=query.shape[1] != key.shape[1])
    return cast(torch.Tensor, varlen_attn(query, key, value, *lengths, **options))


def _options(signature: inspect.Signature, *, grouped: bool) -> dict[str, Any]:
    """Return the keywords for causal, grouped attention, which torch renamed: is_causal until 2.10, then window_size.

    enable_gqa came with 2.12; before it keys of fewer heads were taken without being asked for. Both align a run's last
    query with its last key.
    """
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in signature.parameters else {"is_causal": True}
    if "enable_gqa" in signature.parameters:
        options["enable_gqa"] = grouped
    return options
