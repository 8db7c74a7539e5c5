"""Stand-in for Transformer Engine's compiled module on a machine without CUDA.

Its Python, unmodified, calls these functions; those that the project's models reach compute by torch what the kernels
compute, and raise where the arguments differ from those of the pinned version. Any other function raises when it is
called. Names in capitals are enumerations, whose members are made when they are named.
"""

from __future__ import annotations

import enum
import inspect
from typing import Any

import te_device  # noqa: F401
import torch

Tensors = list[torch.Tensor]


class _Member(int):
    name: str


class _Members(type):
    """The metaclass of an enumeration."""

    @property
    def __members__(cls) -> dict[str, _Member]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, _Member)}

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(len(cls.__members__))
        member.name = name
        setattr(cls, name, member)
        return member


def _function(name: str) -> Any:
    def missing(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

    missing.__name__ = name
    return missing


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _Members(name, (), {}) if name[0].isupper() else _function(name)
    globals()[name] = made
    return made


_TENSORS = [f"GEMM{gemm}_{tensor}" for gemm in (1, 2, 3) for tensor in ("INPUT", "WEIGHT", "OUTPUT")]
_GRADIENTS = [f"GRAD_{tensor}{gemm}" for gemm in (1, 2, 3) for tensor in ("OUTPUT", "INPUT")]
FP8FwdTensors = enum.IntEnum("FP8FwdTensors", _TENSORS, start=0)  # type: ignore[misc]
FP8BwdTensors = enum.IntEnum("FP8BwdTensors", _GRADIENTS, start=0)  # type: ignore[misc]
layernorm_fwd, layernorm_bwd = _function("layernorm_fwd"), _function("layernorm_bwd")

_FP8 = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}
_DTYPES = {"kFloat32": torch.float32, "kFloat16": torch.float16, "kBFloat16": torch.bfloat16, **_FP8}


def _dtype(kind: Any) -> torch.dtype:
    return kind if isinstance(kind, torch.dtype) else _DTYPES[kind.name]


# --- Norms


def rmsnorm_fwd(
    inp: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Return the output, no mean, and 1 / RMS of each row, in fp32."""
    assert inp.dim() == 2 and inp.is_contiguous() and not zero_centered_gamma
    x = inp.float()
    rsigma = torch.rsqrt(x.square().mean(1) + eps)
    y = (x * rsigma[:, None] * weight.float()).to(_dtype(out_dtype))
    if quantizer is not None:
        return quantizer.quantize(y), None, rsigma
    return (y if out is None else out.copy_(y)), None, rsigma


def rmsnorm_bwd(
    grad: torch.Tensor,
    inp: torch.Tensor,
    rsigma: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the input and of the weight."""
    assert not zero_centered_gamma
    normal = inp.float() * rsigma[:, None]
    upstream = grad.float() * weight.float()
    dx = (upstream - normal * (upstream * normal).mean(1, keepdim=True)) * rsigma[:, None]
    return dx.to(inp.dtype), (grad.float() * normal).sum(0).to(weight.dtype)


# --- Products


def _plain(tensor: Any) -> torch.Tensor:
    """The values of a tensor, which may be in fp8."""
    if not hasattr(tensor, "_scale_inv"):
        return tensor
    stored = tensor._data if tensor._data is not None else tensor._transpose.T
    return stored.view(_dtype(tensor._fp8_dtype)).float() * tensor._scale_inv


def _product(a: Any, trans_a: bool, b: Any, trans_b: bool) -> torch.Tensor:
    """op(b) @ op(a): cuBLAS's column-major product of row-major matrices."""
    one, other = _plain(b).flatten(0, -2), _plain(a).flatten(0, -2)
    dtype = torch.promote_types(one.dtype, other.dtype)
    return (one.T if trans_b else one).to(dtype) @ (other.T if trans_a else other).to(dtype)


def generic_gemm(
    a: Any,
    trans_a: bool,
    b: Any,
    trans_b: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any,
    comm_type: Any,
    extra_output: torch.Tensor | None,
    bulk_overlap: bool,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """Return op(b) @ op(a) + bias and, in a backward pass, the bias's gradient."""
    assert not gelu and comm_overlap is None and alpha == 1.0 and quantizer is None
    result = _product(a, trans_a, b, trans_b)
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = _plain(b).flatten(0, -2).sum(0).to(bias.dtype)
        else:
            result = result + bias
    dtype = out.dtype if out is not None else _dtype(out_dtype) if out_dtype is not None else _plain(b).dtype
    shape = (*b.shape[:-1], result.shape[-1]) if not trans_b else result.shape
    result = result.to(dtype).view(shape)
    if out is None:
        return result, bias_grad, None, None
    out.add_(result.view(out.shape)) if accumulate else out.copy_(result.view(out.shape))
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    a: list[Any],
    trans_a: bool,
    b: list[Any],
    trans_b: bool,
    out: Tensors,
    out_dtype: Any,
    m_splits: list[int] | None,
    bias: Tensors,
    bias_dtype: Any,
    single_output: bool,
    gelu_in: Tensors,
    grad: bool,
    workspaces: Tensors,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Tensors:
    """Write op(b[i]) @ op(a[i]); single_output: all into out[0], one below the other."""
    outputs: Any = out
    if single_output:
        assert m_splits is not None
        outputs = out[0].split(m_splits)
    for into, *operands in zip(outputs, a, b, strict=True):
        result = _product(operands[0], trans_a, operands[1], trans_b).to(into.dtype).view(into.shape)
        into.add_(result) if accumulate else into.copy_(result)
    assert not any(each.numel() for each in bias), "experts' biases are not emulated"
    return bias


def get_num_cublas_streams() -> int:
    return 1


# --- Rotary positions


def _rotated(
    t: torch.Tensor, freqs: torch.Tensor, kind: str, cu_seqlens: torch.Tensor | None, inverse: bool
) -> torch.Tensor:
    if kind == "thd":
        assert cu_seqlens is not None and t.dim() == 3 and cu_seqlens.dtype == torch.int32
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        angles = freqs[torch.arange(len(t)) - starts].view(len(t), 1, -1)
    else:
        assert kind == "sbhd" and t.dim() == 4, (kind, t.shape)
        assert len(freqs) >= len(t), "fewer positions than tokens"
        angles = freqs[: len(t)]
    assert freqs.dim() == 4 and freqs.shape[1:3] == (1, 1) and freqs.dtype == torch.float32, freqs.shape
    assert angles.shape[-1] == t.shape[-1], "partial rotary positions are not emulated"
    x = t.float()
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    sign = -1.0 if inverse else 1.0
    return (x * angles.cos() + sign * half * angles.sin()).to(t.dtype)


def fused_rope_forward(
    t: torch.Tensor,
    freqs: torch.Tensor,
    start_positions: torch.Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: torch.Tensor | None,
    cp_size: int,
    cp_rank: int,
    *,
    inverse: bool = False,
) -> torch.Tensor:
    """Rotate queries or keys, in fp32."""
    assert start_positions is None and not interleaved and cp_size == 1
    return _rotated(t, freqs, qkv_format.name.removeprefix("NVTE_").lower(), cu_seqlens, inverse=inverse)


def fused_rope_backward(*arguments: Any) -> torch.Tensor:
    """Rotate back: the arguments of `fused_rope_forward`."""
    return fused_rope_forward(*arguments, inverse=True)


# --- The optimizer's kernels


def multi_tensor_l2norm(
    chunk_size: int, noop: torch.Tensor, lists: list[Tensors], per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of all tensors, [1], and (per_tensor) of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk_size: int, noop: torch.Tensor, lists: list[Tensors], scale: float) -> None:
    """Write the first tensors, scaled, into the second ones."""
    for source, into in zip(*lists, strict=True):
        into.copy_(source * scale)


def multi_tensor_adam(
    chunk_size: int,
    noop: torch.Tensor,
    lists: list[Tensors],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW (mode 1) of gradients, parameters and both moments."""
    assert mode == 1, "Adam with L2 is not emulated"
    one = 1 - beta1**step if bias_correction else 1.0
    two = 1 - beta2**step if bias_correction else 1.0
    for grad, parameter, mean, square in zip(*lists, strict=True):
        g = grad.float()
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (mean / one) / ((square / two).sqrt() + eps) + weight_decay * parameter.float()
        parameter.copy_(parameter.float() - lr * update)


# --- fp8: one scale a tensor


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    """Return the tensor in fp8, scaled by its largest value."""
    assert type(quantizer).__name__ == "Float8CurrentScalingQuantizer", f"not emulated: {type(quantizer).__name__}"
    kind = _dtype(quantizer.dtype)
    amax = tensor.detach().float().abs().max()
    scale = torch.where(amax > 0, torch.finfo(kind).max / amax, torch.ones(()))
    data = (tensor.detach().float() * scale).to(kind).view(torch.uint8)
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(data.flatten(0, -2).T)
        output._transpose_invalid = False
    output._scale_inv.copy_(1 / scale)
    return output


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """Return an fp8 tensor without values, and with its transposed copy where the quantizer wants one."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    turned = [shape[-1], *shape[:-1]]
    return Float8Tensor(
        shape=shape,
        dtype=dtype,
        data=torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        data_transpose=torch.empty(turned, dtype=torch.uint8) if quantizer.columnwise_usage else None,
        fp8_scale_inv=torch.empty(1),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
    )


def dequantize(tensor: Any, out_dtype: Any) -> torch.Tensor:
    """Return the values in another dtype."""
    return _plain(tensor).to(_dtype(out_dtype))


def fp8_transpose(data: torch.Tensor, fp8_dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the transposed bytes."""
    turned = data.flatten(0, -2).T.contiguous()
    return turned if out is None else out.copy_(turned)


def fused_multi_row_padding(inp: torch.Tensor, out: torch.Tensor, m_splits: list[int], padded: list[int]) -> None:
    """Copy each expert's rows to the start of its padded rows, the rest of which are zero."""
    for rows, into in zip(inp.split(m_splits), out.split(padded), strict=True):
        into.zero_()
        into[: len(rows)] = rows


def fused_multi_row_unpadding(inp: torch.Tensor, out: torch.Tensor, padded: list[int], m_splits: list[int]) -> None:
    """Copy each expert's rows without their padding."""
    for rows, into in zip(inp.split(padded), out.split(m_splits), strict=True):
        into.copy_(rows[: len(into)])


def split_quantize(
    tensor: torch.Tensor, m_splits: list[int], quantizers: list[Any], *, disable_bulk_allocation: bool = False
) -> list[Any]:
    """Return each expert's rows in fp8."""
    return [quantize(rows, each) for rows, each in zip(tensor.split(m_splits), quantizers, strict=True)]


# --- Versions


def get_cudnn_version() -> int:
    return 92000


def get_cublasLt_version() -> int:
    return 130000


__all__ = [name for name, value in globals().items() if inspect.isfunction(value) and not name.startswith("_")]
