"""Attention without Transformer Engine on a GPU: torch's `varlen_attn` against fp64, and the memory that it takes.

Needs torch 2.10 or later and Megatron-Core:  python -m pytest -m gpu tests/gpu/test_attention_gpu.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from eaopd_megatron.data.packing import cp_shard_indices
from eaopd_megatron.megatron import layers
from eaopd_megatron.megatron.layers import CoreAttention, PackedSequences
from eaopd_megatron.megatron.varlen_attention import varlen_attention, varlen_refusal
from tests.emulated_varlen import attention_of_runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
LENGTHS = [700, 1, 130, 64, 1025, 8]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def attention() -> CoreAttention:
    config: Any = SimpleNamespace(context_parallel_size=1)
    return CoreAttention(config, 1, AttnMaskType.causal)


def packed(lengths: list[int]) -> PackedSequences:
    return PackedSequences.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0).int().cuda(), max(lengths))


def heads_of(tokens: int, dtype: torch.dtype, *, groups: int, width: int, heads: int = 8) -> list[torch.Tensor]:
    """Query, key and value as they come: key and value are strided views of one product."""
    generator = torch.Generator("cuda").manual_seed(0)
    product = torch.randn(tokens, heads + 2 * groups, width, device="cuda", generator=generator).to(dtype)
    return [part.requires_grad_() for part in product.split([heads, groups, groups], dim=1)]


def close(ours: torch.Tensor | None, exact: torch.Tensor | None, tolerance: float, what: str) -> None:
    assert ours is not None and exact is not None and ours.isfinite().all(), what
    error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
    assert error <= tolerance, f"{what}: {error:.3g}"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("groups", "width"), [(8, 64), (2, 128), (1, 80)])
def test_packed_sequences_against_fp64(groups: int, width: int, dtype: torch.dtype) -> None:
    """Values and gradients, with fewer key heads than heads and a sequence of one token."""
    assert varlen_refusal(torch.device("cuda"), dtype, width) is None
    inputs, sequences = heads_of(sum(LENGTHS), dtype, groups=groups, width=width), packed(LENGTHS)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = leaves
    exact = attention_of_runs(q, k, v, sequences.cu_seqlens, sequences.cu_seqlens).flatten(1)
    upstream = torch.randn_like(exact).to(dtype)
    exact.backward(upstream.double())
    with mock.patch.object(layers, "_packed", side_effect=AssertionError("the sequences were padded")):
        ours = attention()(*inputs, None, AttnMaskType.causal, sequences)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    close(ours, exact, TOLERANCE[dtype], "output")
    for name, gradient, leaf in zip(("query", "key", "value"), gradients, leaves, strict=True):
        close(gradient, leaf.grad, TOLERANCE[dtype], f"gradient of {name}")


@pytest.mark.parametrize("size", [2, 4])
def test_a_context_parallel_ranks_queries_against_fp64(size: int) -> None:
    """Runs of fewer queries than keys are aligned at their ends."""
    lengths = [2 * size * n for n in (50, 1, 129)]
    sequences = packed(lengths)
    q, k, v = (x.detach() for x in heads_of(sum(lengths), torch.bfloat16, groups=2, width=128))
    ends = sequences.cu_seqlens
    exact = attention_of_runs(q.double(), k.double(), v.double(), ends, ends)
    gathered = torch.cat(sequences.parts(size))
    for rank in range(size):
        mine = cp_shard_indices(sequences.cu_seqlens.long(), size, rank)
        part = varlen_attention(q[mine], k[gathered], v[gathered], packed(lengths).segments(size, rank))
        close(part, exact[mine], TOLERANCE[torch.bfloat16], f"rank {rank} of {size}")


def test_short_sequences_beside_a_long_one_take_no_padding() -> None:
    """Padded, 64 sequences of 8,192 tokens at 8 heads of 128 would take a GiB an input; packed they take 24 MiB."""
    lengths = [8192, *[64] * 63]
    inputs, sequences = heads_of(sum(lengths), torch.bfloat16, groups=2, width=128), packed(lengths)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention()(*inputs, None, AttnMaskType.causal, sequences).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 2**20:.0f} MiB beyond the inputs")
    assert peak < 2**29


def test_a_prefill_of_padded_prompts_keeps_no_scores() -> None:
    """All scores of 16 prompts of 2,048 tokens at 32 heads would take 4 GiB in bf16, 8 in fp32."""
    b, s, heads, groups, width = 16, 2048, 32, 8, 128
    q, k, v = (torch.randn(s, b, n, width, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups))
    mask = torch.ones(s, s, dtype=torch.bool, device="cuda").triu(1).expand(b, 1, s, s).clone()
    mask[1:, :, :, :100] = True  # padding on the left
    mask[:, :, range(s), range(s)] = False
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        out = attention()(q, k, v, mask, AttnMaskType.arbitrary)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 2**20:.0f} MiB beyond the inputs")
    assert peak < 3 * 2**30
    two = slice(0, 2)
    wide = (q, k.repeat_interleave(4, dim=2), v.repeat_interleave(4, dim=2))
    one, other, third = (x[:, two].permute(1, 2, 0, 3).double() for x in wide)
    exact = torch.nn.functional.scaled_dot_product_attention(one, other, third, attn_mask=~mask[two])
    close(out[:, two], exact.permute(2, 0, 1, 3).flatten(2), TOLERANCE[torch.bfloat16], "output")
