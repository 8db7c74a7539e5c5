"""Variable-length attention: how torch's function is called, and what packed sequences attend to."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.varlen import varlen_attn

from eaopd_megatron.data.packing import cp_shard_indices
from eaopd_megatron.megatron import layers, varlen_attention
from eaopd_megatron.megatron.layers import CoreAttention, PackedSequences
from tests.emulated_varlen import attention_of_runs, emulated


def signature_with(*keywords: str) -> inspect.Signature:
    """As torch's, with these behind the tensors and lengths."""
    positional = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    ]
    rest = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in keywords]
    return inspect.Signature([*positional, *rest])


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        (signature_with("is_causal", "return_aux"), {"is_causal": True}),
        (signature_with("return_aux", "scale", "window_size"), {"window_size": (-1, 0)}),
        (
            signature_with("return_aux", "scale", "window_size", "enable_gqa"),
            {"window_size": (-1, 0), "enable_gqa": True},
        ),
        (inspect.signature(varlen_attn), {"window_size": (-1, 0), "enable_gqa": True}),
    ],
    ids=["2.10", "2.11", "2.12 to 2.14", torch.__version__],
)
def test_every_torch_gets_the_arguments_that_it_has(signature: inspect.Signature, expected: dict[str, Any]) -> None:
    options = varlen_attention._options(signature, grouped=True)
    assert options == expected
    signature.bind("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", 5, 5, **options)


def attention() -> CoreAttention:
    config: Any = SimpleNamespace(context_parallel_size=1)
    return CoreAttention(config, 1, AttnMaskType.causal)


def packed(lengths: list[int]) -> PackedSequences:
    return PackedSequences.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_values_and_gradients_are_those_of_padded_sequences(groups: int) -> None:
    lengths, found = [7, 1, 12, 3], []
    generator = torch.Generator().manual_seed(groups)
    leaves = [torch.randn(sum(lengths), n, 8, dtype=torch.float64, generator=generator) for n in (4, groups, groups)]
    weight = torch.randn(sum(lengths), 32, dtype=torch.float64, generator=generator)
    for varlen in (False, True):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        arguments = (*inputs, None, AttnMaskType.causal, packed(lengths))
        if varlen:
            with emulated() as stands:
                out = attention()(*arguments)
            stands.assert_called_once()
        else:
            out = attention()(*arguments)
        (out * weight).sum().backward()
        found.append([out, *(leaf.grad for leaf in inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_context_parallel_ranks_queries_see_the_keys_before_them(size: int) -> None:
    lengths = [2 * size * n for n in (3, 1, 4)]
    sequences, total = packed(lengths), sum(lengths)
    q, k, v = (torch.randn(total, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = attention_of_runs(q, k, v, sequences.cu_seqlens, sequences.cu_seqlens)
    gathered = torch.cat(sequences.parts(size))
    for rank in range(size):
        mine = cp_shard_indices(sequences.cu_seqlens.long(), size, rank)
        segments = packed(lengths).segments(size, rank)
        with emulated():
            part = varlen_attention.varlen_attention(q[mine], k[gathered], v[gathered], segments)
        torch.testing.assert_close(part, whole[mine], rtol=0, atol=1e-12)
        assert segments.key_rows is not None
        assert len(segments.key_rows) == total * (2 * size + 1) // (2 * size), "more keys than one sequence and a chunk"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 128, "no CUDA"),
        ("cuda", torch.float32, 128, "float32 heads"),
        ("cuda", torch.bfloat16, 12, "heads of 12"),
        ("cuda", torch.bfloat16, 512, "heads of 512"),
    ],
)
def test_padded_attention_says_why(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert varlen_attention.varlen_refusal(torch.device(device), dtype, head_dim) == reason


def test_one_line_says_which_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(params_dtype=torch.float32, kv_channels=128)
    line = layers.attention_in_use(config)
    assert line.endswith("longest (varlen_attn does not run: no CUDA)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pads" in layers.attention_in_use(config) and "float32 heads" in layers.attention_in_use(config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config.params_dtype = torch.bfloat16
    assert layers.attention_in_use(config).startswith("attention: torch's varlen_attn, without padding")
    monkeypatch.setattr(layers.gpt_layer_specs, "HAVE_TE", True)
    assert layers.attention_in_use(config) == "attention: Transformer Engine's"
