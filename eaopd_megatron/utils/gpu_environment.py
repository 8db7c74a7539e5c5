"""Variables that CUDA, NCCL and torch read once, at their start, and the GPU of a rank.

They are set in the rank itself, before anything asks for a device: so it does not matter whether the launcher, torchrun
or srun started it. A variable that the user has set is kept, in every process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from eaopd_megatron.errors import UserError

if TYPE_CHECKING:
    from eaopd_megatron.config.parallel import ParallelLayout

UPDATE_GROUP_VARIABLES = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What all processes of a weight-update group must agree on, with the values that SGLang (0.5.21 to 0.5.23) gives its
servers where nothing is set. NCCL's own defaults are other ones, and its handshake fails or hangs where they differ."""
EXACT_FP32_VARIABLES = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Transformer Engine multiplies fp32 matrices in TF32, of 11 bits, whatever torch's own settings are."""
_TRAINER_WITH_UPDATE_GROUPS = {
    # torch's monitor would abort the trainer eight minutes after a server died in a broadcast: the watchdog of every
    # group signals it, whatever the group's own error handling. Dead ranks are noticed by `heartbeat_monitor`.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
_MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_FIRST_BLACKWELL = 10  # major compute capability from which kernels need not be launched through one queue
_own: set[str] = set()


def set_unless_given(variables: Mapping[str, str]) -> None:
    """Set variables of this process that the user has not set. Child servers do not inherit them."""
    for name, value in variables.items():
        if name not in os.environ:
            os.environ[name] = value
            _own.add(name)


def own_variables() -> frozenset[str]:
    """Return the variables that `set_unless_given` set here."""
    return frozenset(_own)


def prepare_rank(layout: ParallelLayout, *, precision: str = "bf16", update_groups: bool = False) -> None:
    """Set this rank's variables; nothing may have asked for a CUDA device before.

    layout, precision: of the rank's models. update_groups: whether the rank is to share NCCL groups with SGLang's
    servers.
    """
    if precision == "fp32":
        set_unless_given(EXACT_FP32_VARIABLES)
    if update_groups:
        set_unless_given(UPDATE_GROUP_VARIABLES | _TRAINER_WITH_UPDATE_GROUPS)
    if layout.tensor_parallel > 1 or layout.context_parallel > 1:
        capability = oldest_capability()
        if capability is not None and capability[0] < _FIRST_BLACKWELL:
            set_unless_given({_MAX_CONNECTIONS: "1"})  # Megatron-Core overlaps by the order of launches


def oldest_capability() -> tuple[int, int] | None:
    """Return the lowest compute capability of this host's GPUs; None without a driver. Does not initialise CUDA."""
    with suppress(ValueError):
        parts = (capability.partition(".") for (capability,) in query_gpus("compute_cap"))
        return min(((int(major), int(minor)) for major, _, minor in parts), default=None)
    return None


def query_gpus(*fields: str) -> list[list[str]]:
    """Return nvidia-smi's values of these fields, without units, of each of this host's GPUs; none without a driver."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        return [line.split(",") for line in listed.splitlines()]
    return []


def update_group_environment() -> dict[str, str]:
    """Return the values of UPDATE_GROUP_VARIABLES in force here, for a server that joins this host's groups."""
    return {name: os.environ.get(name, value) for name, value in UPDATE_GROUP_VARIABLES.items()}


def server_nccl_settings(info: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of UPDATE_GROUP_VARIABLES that an SGLang server's options imply. info: of /server_info.

    Without these options the server has what its own environment says, which it does not tell, or else "0".
    """
    symmetric, multicast = (bool(info.get(name)) for name in ("enable_symm_mem", "enable_nccl_nvls"))
    forced = {"NCCL_CUMEM_ENABLE": symmetric, "NCCL_NVLS_ENABLE": symmetric or multicast}
    return {name: "1" for name, value in forced.items() if value}


def nccl_difference(url: str, info: Mapping[str, Any]) -> str | None:
    """Return one line if a server's options give NCCL other settings than this process has, else None."""
    here = update_group_environment()
    other = {name: value for name, value in server_nccl_settings(info).items() if value != here[name]}
    if not other:
        return None
    there = " ".join(f"{name}={value}" for name, value in other.items())
    ours = ", ".join(f"{name}={here[name]}" for name in other)
    return (
        f"{url} runs NCCL with {there} (its options enable_symm_mem, enable_nccl_nvls), the trainer with {ours}: "
        f"export {there} for the trainer, start the server without the option, or set weight_sync.transport=disk"
    )


def local_device_index(environment: Mapping[str, str] = os.environ) -> int:
    """Return the index of this rank's GPU among the visible ones: LOCAL_RANK, or 0 if the site shows each task its own.

    Raises UserError if there is no such GPU.
    """
    import torch

    visible, local = torch.cuda.device_count(), int(environment.get("LOCAL_RANK", "0"))
    if visible == 1:
        return 0
    if local >= visible:
        raise UserError(
            f"LOCAL_RANK is {local}, and this rank sees {visible} GPUs (CUDA_VISIBLE_DEVICES="
            f"{environment.get('CUDA_VISIBLE_DEVICES', '')}): show every rank all GPUs of its host, or its own alone"
        )
    return local
