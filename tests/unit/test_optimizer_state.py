"""How a distributed optimiser's part of a weight is written: as boxes of it."""

from __future__ import annotations

import math

import pytest
import torch

from eaopd_megatron.megatron.optimizer_state import boxes_of_range


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (4, 1), (1, 6), (3, 4, 2)])
def test_boxes_leave_out_an_element_or_repeat_one(shape: tuple[int, ...]) -> None:
    """Every range of every shape: the boxes' elements, one box after the other, are the range."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            boxes = list(boxes_of_range(shape, start, end))
            found = [numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in boxes]
            assert torch.cat([*found, torch.zeros(0, dtype=torch.long)]).tolist() == list(range(start, end))
            assert len(boxes) <= 2 * len(shape) - 1 and all(len(part) for part in found)
