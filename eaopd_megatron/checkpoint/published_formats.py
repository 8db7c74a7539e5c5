"""What published folders hold beside plain weights: FP8 weights with their scales, buffers, other quantised formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from eaopd_megatron.checkpoint.safetensors_io import LazyTensor
from eaopd_megatron.errors import UserError

SCALE_SUFFIX = "_scale_inv"
"""An FP8 tensor NAME has its scales, by which it is multiplied, in NAME_scale_inv."""

_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"  # computed from config.json
    r"|\.masked_bias$|(^|\.)position_ids$"
    r"|\.(k|v|q|kv|prob)_scale$|\.(input|activation|output)_scale(_inv)?$"  # of activations and of FP8 KV caches
)
_FORMATS = {
    "AWQ or GPTQ (qweight)": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "bitsandbytes (absmax, quant_state)": re.compile(r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\..*)$"),
    "compressed-tensors (weight_packed, weight_scale)": re.compile(
        r"\.weight_(packed|shape|scale|zero_point|global_scale)$"
    ),
    "mxfp4 (blocks and scales)": re.compile(r"_blocks$"),
}


def is_buffer(name: str) -> bool:
    """Return whether a tensor has no meaning for the weights: it can be computed, or belongs to activations."""
    return _BUFFERS.search(name) is not None


def foreign_format(names: Iterable[str]) -> str | None:
    """Return the quantised format that the names of a folder's tensors give away; None: none of those known here."""
    listed = list(names)
    return next((kind for kind, sign in _FORMATS.items() if any(map(sign.search, listed))), None)


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


class Fp8Tensor:
    """A lazy FP8 weight times its scales, in fp32. Reads like `LazyTensor`.

    scales: one for the tensor, one per row [rows] or [rows, 1], or one per block [rows / 128, columns / 128], rounded
    up. block: `weight_block_size` of config.json. Raises UserError for another shape.
    """

    dtype = torch.float32

    def __init__(self, weight: LazyTensor, scales: torch.Tensor, block: Any) -> None:
        self.weight, self.location = weight, weight.location
        rows, columns = shape = weight.location.shape
        self._scales, found = scales.float(), tuple(scales.shape)
        if scales.numel() == 1:
            self._block, self._scales = (rows, columns), self._scales.reshape(1, 1)
        elif found in ((rows,), (rows, 1)):
            self._block, self._scales = (1, columns), self._scales.reshape(rows, 1)
        elif _is_block(block) and found == (-(-rows // block[0]), -(-columns // block[1])):
            self._block = (block[0], block[1])
        else:
            raise UserError(
                f"{weight.label}: scales of shape {list(found)} do not fit an FP8 tensor of shape {list(shape)} "
                f"(weight_block_size is {block!r})"
            )

    def get_shape(self) -> Sequence[int]:
        """Return the shape."""
        return self.weight.get_shape()

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        shape = self.location.shape
        start, end, _ = rows.indices(shape[0])
        first, last, _ = columns.indices(shape[1])
        out = self.weight[index].float()
        number_of_column = torch.arange(first, last) // self._block[1]
        row = start
        while row < end:  # a block of rows at a time: its scales are a vector
            number = row // self._block[0]
            stop = min(end, (number + 1) * self._block[0])
            out[row - start : stop - start] *= self._scales[number][number_of_column]
            row = stop
        return out
