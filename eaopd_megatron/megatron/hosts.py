"""Which ranks share a host: what the first one starts has the GPUs after theirs, at addresses of that host."""

from __future__ import annotations

import socket

import torch.distributed as dist

from eaopd_megatron.megatron.groups import Parallel


def ranks_beside_the_first(parallel: Parallel) -> int:
    """How many ranks are on the main rank's host, itself among them. Collective.

    Neither srun nor a launcher of a site's own says it as torchrun does (LOCAL_WORLD_SIZE).
    """
    mine = socket.gethostname()
    hosts = [mine] * parallel.world_size
    if parallel.world_size > 1:
        dist.all_gather_object(hosts, mine)
    return hosts.count(hosts[0])
