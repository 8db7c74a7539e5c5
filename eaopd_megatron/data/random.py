"""Random numbers as pure functions of what they are for.

No generator's state lives longer than one draw, so a resumed run, another data-parallel size or another batch size of
the generator sees the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`, such as (seed, "prompts", epoch)."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def uniforms(count: int, *key: int | str) -> torch.Tensor:
    """[count] fp64 in [0, 1)."""
    return torch.rand(count, dtype=torch.float64, generator=generator(*key))
