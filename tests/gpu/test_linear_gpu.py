"""The linear form on a GPU, whose products of bf16 factors are summed in fp32, against fp64.

Needs torch alone, and uses Triton where it is:  python -m pytest -m gpu tests/gpu/test_linear_gpu.py
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from eaopd_megatron.objective import Objective, TeacherHidden, TeacherLogits, linear_entropy_aware_loss
from eaopd_megatron.objective import linear as linear_head
from eaopd_megatron.objective.dense_reference import dense_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("preset", Objective.PRESETS)
def test_values_and_gradients_against_fp64(preset: str, dtype: torch.dtype) -> None:
    """Several tiles in both directions, the last ones smaller, and padding. The oracle's logits are products in fp64:
    values are fp32's whatever the factors' precision, gradients have the latter."""
    n, vocab_size, padded, width, other = 300, 5000, 5120, 64, 96
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)

    hidden, head = normal(n, width), normal(padded, width, scale=0.3)
    teacher = TeacherHidden(normal(n, other), normal(padded, other, scale=0.3))
    tokens = torch.randint(0, vocab_size, (n,), device="cuda", generator=generator)
    upstream = torch.randn(n, device="cuda", generator=generator)
    objective = Objective.preset(preset, threshold=5.5)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    with mock.patch.object(linear_head, "GPU_TILE_ELEMENTS", 128 * 1024):
        out = linear_entropy_aware_loss(
            *leaves, teacher, tokens, None, objective=objective, vocab_size=vocab_size, chunk=128
        )
        out.loss.backward(upstream)
    logits = (hidden.double() @ head.double().T).requires_grad_()
    whole = TeacherLogits(teacher.hidden.double() @ teacher.head_weight.double().T)
    want = dense_loss(logits, whole, tokens, None, objective=objective, vocab_size=vocab_size)
    want.loss.backward(upstream.double())
    assert logits.grad is not None
    pairs = {
        "loss": (out.loss, want.loss),
        "hidden": (leaves[0].grad, logits.grad @ head.double()),
        "head": (leaves[1].grad, logits.grad.T @ hidden.double()),
    }
    for name, (got, exact) in pairs.items():
        assert got is not None and got.isfinite().all(), name
        error = (got.double() - exact).abs().max() / exact.abs().max()
        limit = TOLERANCE[torch.float32] if name == "loss" else TOLERANCE[dtype]
        assert error <= limit, f"{name}: {error:.3g}"
