"""Overlapped communication of data-parallel ranks: who starts a collective, and who waits for it.

Every collective starts where all ranks pass (backward, `step`); a forward pass only waits. So no
rank has to run a forward pass for another to get on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

_WAIT = "wait_for_gather"
"""The attribute of a parameter whose gather may be under way: waits until it has ended."""


def prepare_gathers(chunks: Iterable[Any]) -> None:
    """Let each parameter of chunks with overlapped gathers know how to wait for its own.

    Megatron-Core waits in hooks before the forward of the module that holds a parameter. Who reads a parameter without
    that module (the objective reads the output layer, a checkpoint all) calls `gathered`.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)  # or the first forward would start the first gather
        for parameter, group in chunk.param_to_bucket_group.items():
            setattr(parameter, _WAIT, partial(_wait, group))


def _wait(group: Any) -> None:
    if group.param_gather_handle is not None:  # else Megatron-Core would start a gather of this rank's own
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def gathered(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The parameter, once its gather has ended."""
    wait = getattr(parameter, _WAIT, None)
    if wait is not None:
        wait()
    return parameter


def start_gathers(chunks: Iterable[Any]) -> None:
    """Begin to gather the weights that other ranks updated, where that is overlapped. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()


def wait_for_gathers(chunks: Iterable[torch.nn.Module]) -> None:
    """Wait until every parameter of the chunks is whole."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            gathered(parameter)
