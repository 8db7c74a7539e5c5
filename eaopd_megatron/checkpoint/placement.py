"""Which ranks hold a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from eaopd_megatron.checkpoint.mapping import EMBEDDING, Entry, Place
from eaopd_megatron.megatron.architecture import padded_vocab_size
from eaopd_megatron.megatron.groups import Layout, Parallel


@dataclass(frozen=True)
class Placement:
    """A model's parameters over the ranks of a layout.

    sizes: the model's, by the names that its family's rules use.
    """

    layout: Layout
    sizes: Mapping[str, int]

    def stage(self, entry: Entry) -> int:
        """The pipeline rank that holds a parameter; a tied embedding's copy is the last one's."""
        if entry.layer is None:
            return 0 if entry.megatron == EMBEDDING else self.layout.pipeline_parallel - 1
        chunks = self.layout.pipeline_parallel * self.layout.virtual_pipeline
        chunk = entry.layer // (self.sizes["layers"] // chunks)
        return chunk % self.layout.pipeline_parallel

    def expert_rank(self, entry: Entry) -> int | None:
        """The expert-parallel rank that holds an expert's parameter; None for the parameters that all of them hold."""
        if entry.expert is None:
            return None
        return entry.expert // (self.sizes["experts"] // self.layout.expert_parallel)

    def shards(self, entry: Entry) -> int:
        """How many ranks share one copy of the parameter."""
        return self.layout.tensor_parallel if entry.expert is None else self.layout.expert_tensor_parallel

    def shard(self, entry: Entry, number: int = 0) -> Place:
        """The place of one of the ranks that share the parameter."""
        padded = padded_vocab_size(self.sizes["vocab"], self.layout.tensor_parallel)
        return Place(number, self.shards(entry), self.sizes, padded)

    def holds(self, parallel: Parallel, entry: Entry) -> bool:
        """Whether this rank has a shard of the parameter."""
        return self.stage(entry) == parallel.pp_rank and self.expert_rank(entry) in (None, parallel.ep_rank)


@dataclass(frozen=True)
class Seat:
    """A rank's numbers in the groups that decide what it holds. copy: 0 on the first of the ranks with the same."""

    stage: int
    tensor: int
    copy: int
    expert: int
    expert_tensor: int
    expert_copy: int


class Seats:
    """The seats of all ranks. Making it is collective over all ranks."""

    def __init__(self, parallel: Parallel) -> None:
        mine = Seat(
            stage=parallel.pp_rank,
            tensor=parallel.tp_rank,
            copy=parallel.dp_rank * parallel.cp_size + parallel.cp_rank,
            expert=parallel.ep_rank,
            expert_tensor=parallel.etp_rank,
            expert_copy=parallel.expert_dp_rank,
        )
        seats: list[Seat | None] = [mine]
        if parallel.world_size > 1:
            seats = [None] * parallel.world_size
            dist.all_gather_object(seats, mine)
        self._dense: dict[int, dict[int, int]] = {}
        self._experts: dict[tuple[int, int], dict[int, int]] = {}
        for rank, seat in enumerate(seats):
            assert seat is not None
            if seat.copy == 0:
                self._dense.setdefault(seat.stage, {})[seat.tensor] = rank
            if seat.expert_copy == 0:
                self._experts.setdefault((seat.stage, seat.expert), {})[seat.expert_tensor] = rank

    def holders(self, placement: Placement, entry: Entry) -> Sequence[int]:
        """Global ranks of one copy of a parameter, in the order of its shards."""
        stage, expert = placement.stage(entry), placement.expert_rank(entry)
        ranks = self._dense[stage] if expert is None else self._experts[stage, expert]
        return [ranks[number] for number in range(placement.shards(entry))]
