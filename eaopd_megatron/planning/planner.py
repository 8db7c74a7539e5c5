"""A recipe's plan: its own layout, and every other one of as many GPUs that fits, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property

from eaopd_megatron.models.supported import ModelInfo
from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.hardware import GiB, GpuSpec, TimeAssumptions
from eaopd_megatron.planning.layouts import PlannedLayout, enumerate_layouts, layout_refusals
from eaopd_megatron.planning.memory import (
    MEMORY_PHASES,
    GpuMemory,
    PlannedServers,
    StudentGpus,
    separate_teacher_memory,
    served_teacher_memory,
)
from eaopd_megatron.planning.times import TimeEstimates
from eaopd_megatron.planning.workload import PlannedTeacher, Workload

TEACHER_GPUS = (1, 2, 4, 8, 16, 32, 64)
_OVERRIDE_KEYS = {
    **{field.name: f"student.{field.name}" for field in fields(PlannedLayout)},
    "recompute": "student.recompute",
    "distributed_optimizer": "optimizer.distributed",
    "micro_batch_tokens": "train.micro_batch_tokens",
    "rollout_batch": "rollout.batch_size",
}
"""What an option may change: fields of a layout and of a workload, and the recipe's keys for them."""
_EQUAL_TIME_SHARE = 0.02  # share by which estimates of time must differ to count
_FREE_SHARE = 0.15  # share of a GPU that had better stay free


@dataclass(frozen=True)
class LayoutOption:
    """A layout with its micro-batch and rollout sizes: what it needs, and about how long it takes."""

    layout: PlannedLayout
    work: Workload
    memory: GpuMemory
    seconds: dict[str, float]  # of an iteration: generation, teacher (scoring), student (forward, backward), ...
    ahead: bool = False  # the next responses are written meanwhile

    @property
    def total(self) -> float:
        """Estimated seconds of an iteration."""
        generation, whole = self.seconds["generation"], sum(self.seconds.values())
        return max(generation, whole - generation) if self.ahead else whole

    def overrides(self, layout: PlannedLayout, work: Workload) -> str:
        """What makes a recipe of that layout and workload this option, ready to be pasted; its changes come first."""
        here, there = ({**asdict(one), **asdict(other)} for one, other in ((self.layout, self.work), (layout, work)))
        said = [name for name in _OVERRIDE_KEYS if here[name] != there[name]]
        if "data_parallel" not in said:
            said.append("data_parallel")  # which the recipe may leave to the number of ranks
        return " ".join(f"{_OVERRIDE_KEYS[name]}={str(here[name]).lower()}" for name in said)


@dataclass(frozen=True)
class LayoutSearch:
    """What became of each layout of so many GPUs.

    options: those that fit, best first: by time, and of about the same time those with room enough. refused: those that
    cannot be cut, with a reason. too_large: the others, as the recipe would have them.
    """

    options: list[LayoutOption]
    unsupported: dict[PlannedLayout, str]
    too_large: list[LayoutOption]


@dataclass(frozen=True)
class Planner:
    """A student and its teachers on one kind of GPU."""

    student: ModelInfo
    teachers: tuple[PlannedTeacher, ...]
    work: Workload
    gpu: GpuSpec
    limit: float  # GiB of a GPU
    assumed: TimeAssumptions = field(default_factory=TimeAssumptions)
    servers: PlannedServers | None = None  # none: the trainer writes the responses

    @property
    def reserve(self) -> float:
        return self.assumed.reserve * GiB

    def fits(self, memory: GpuMemory) -> bool:
        return memory.peak <= self.limit * GiB

    def clock(self, work: Workload) -> TimeEstimates:
        return TimeEstimates(self.gpu, self.assumed, work)

    def scorers(self, apart: bool) -> tuple[PlannedTeacher, ...]:
        """The teachers as the recipe places them, or (apart) all on GPUs of their own."""
        return tuple(scorer.on_own_gpus() for scorer in self.teachers) if apart else self.teachers

    def memory(self, layout: PlannedLayout, work: Workload, *, apart: bool = False) -> GpuMemory:
        """Of the student's GPUs."""
        mine = StudentGpus(self.student.shape, self.scorers(apart), layout, work, self.reserve)
        if self.servers is None:
            return mine.memory()
        if not self.servers.colocated:
            return replace(mine, writer="servers elsewhere").memory()
        server, process = self.servers.memory_fraction * self.limit * GiB, self.assumed.server_process * GiB
        return replace(mine, writer="colocated servers", server=server, process=process).memory()

    def option(self, layout: PlannedLayout, work: Workload, *, apart: bool = False) -> LayoutOption:
        """Memory and time of one choice. Teachers elsewhere take no time here: they score during generation."""
        memory = self.memory(layout, work, apart=apart)
        clock = self.clock(work)
        share = work.updates
        student, servers = self.student.shape, self.servers
        if servers is None:
            seconds = {"generation": clock.generation(student, layout)}
        else:
            seconds = {"generation": clock.served(student, servers, self.limit * GiB)}
        if here := [scorer for scorer in self.scorers(apart) if scorer.colocated]:
            seconds["teacher"] = sum(self._scoring(scorer, layout, clock, len(here)) for scorer in here)
        seconds["student"] = share * clock.update(student, layout)
        seconds["optimiser"] = share * clock.step(student, layout)
        seconds["weight sync"] = 0.0 if servers is None else clock.sent([self.weight_sync(servers, layout)])
        return LayoutOption(layout, work, memory, seconds, ahead=servers is not None and servers.ahead)

    def weight_sync(self, servers: PlannedServers, layout: PlannedLayout) -> traffic.TrafficFlow:
        """Of an iteration."""
        span = layout.gpus if servers.colocated else layout.gpus + servers.gpus
        return traffic.weight_sync_traffic(self.student.shape, servers.count, self.work.student_element, span)

    def _scoring(self, scorer: PlannedTeacher, layout: PlannedLayout, clock: TimeEstimates, teachers: int) -> float:
        """Seconds of an iteration. Of several each is taken to have as many of the responses as the others."""
        updates = clock.work.updates
        tokens = clock.tokens(layout) / teachers
        seconds = updates * clock.scoring(scorer.shape, layout, tokens, element=scorer.element)
        if scorer.offloaded:
            times = 1 if scorer.signal == "topk" else updates
            seconds += times * clock.fetched(scorer.weights(layout, 0, self.student.shape.vocab))
        return seconds

    def refusals(self, layout: PlannedLayout, *, apart: bool = False, names: bool = False) -> list[str]:
        """Why the student, or a teacher beside it, cannot be cut so. Expert parallelism is that of whoever has
        experts."""
        found = []
        for model, key in self._roles(apart):
            idle = not model.shape.experts and self._experts(apart)
            label = f"{key}.model: {model.name}" if names else f"{key}.model"
            found += layout_refusals(model.shape, layout.without_experts() if idle else layout, label)
        return found

    def _roles(self, apart: bool) -> list[tuple[ModelInfo, str]]:
        here = [(scorer.model, scorer.key) for scorer in self.scorers(apart) if scorer.colocated]
        return [(self.student, "student"), *here]

    def _experts(self, apart: bool) -> bool:
        """Whether any model on these GPUs has experts."""
        return any(model.shape.experts for model, _ in self._roles(apart))

    def search(self, gpus: int, *, apart: bool = False) -> LayoutSearch:
        """Every layout of so many GPUs."""
        found: list[LayoutOption] = []
        refused: dict[PlannedLayout, str] = {}
        too_large = []
        for layout in enumerate_layouts(gpus, experts=self._experts(apart)):
            if reasons := self.refusals(layout, apart=apart):
                refused[layout] = reasons[0]
            elif best := self._first(layout, apart):
                found.append(best)
            else:
                too_large.append(self.option(layout, self.work, apart=apart))
        least = min((option.total for option in found), default=1.0)

        def rank(option: LayoutOption) -> tuple[int, float, float]:
            tight = max(0.0, option.memory.peak - (1 - _FREE_SHARE) * self.limit * GiB)
            return int((option.total / least - 1) / _EQUAL_TIME_SHARE), tight, option.total

        return LayoutSearch(sorted(found, key=rank), refused, too_large)

    def _first(self, layout: PlannedLayout, apart: bool) -> LayoutOption | None:
        """The layout with the first of `_thriftier` workloads that fits."""
        for work in _thriftier(self.work):
            if self.fits(self.memory(layout, work, apart=apart)):
                return self.option(layout, work, apart=apart)
        return None

    @property
    def largest_teacher(self) -> PlannedTeacher:
        return max(self.teachers, key=lambda scorer: scorer.shape.hf_parameters().total)

    def separate(self, scorer: PlannedTeacher) -> SeparateTeacherPlan | None:
        """A teacher on the fewest GPUs of its own that hold it, in the quickest layout; none: on no number tried."""
        shape = scorer.shape
        for gpus in TEACHER_GPUS:
            cuts = (
                cut for cut in enumerate_layouts(gpus, experts=bool(shape.experts)) if not layout_refusals(shape, cut)
            )
            tried = [self.elsewhere(replace(scorer.on_own_gpus(), layout=layout)) for layout in cuts]
            if found := [one for one in tried if self.fits(one.memory)]:
                return min(found, key=lambda option: (option.seconds, option.memory.peak))
        return None

    def elsewhere(self, scorer: PlannedTeacher) -> SeparateTeacherPlan:
        """A teacher that is not colocated, in its own layout."""
        work, layout, clock = self.work, scorer.layout, self.clock(self.work)
        if scorer.placement == "served":
            memory = served_teacher_memory(scorer, self.limit * GiB)
        else:
            memory = separate_teacher_memory(scorer, layout, work, self.reserve)
        tokens = work.prompts * clock.sequence / layout.data_parallel / scorer.replicas
        answer = traffic.payload_traffic(
            work.prompts * clock.response, scorer.bytes_per_token, layout.gpus * scorer.replicas
        )
        head = scorer.signal == "topk"
        seconds = clock.scoring(scorer.shape, layout, tokens, head=head, element=scorer.element) + clock.sent([answer])
        most = work.prompts * work.longest_response * scorer.bytes_per_token
        return SeparateTeacherPlan(scorer, memory, seconds, most)


@dataclass(frozen=True)
class SeparateTeacherPlan:
    """A teacher on GPUs of its own."""

    scorer: PlannedTeacher
    memory: GpuMemory  # of a GPU
    seconds: float  # of an iteration
    sent: float  # bytes of an iteration's answers, where responses are as long as they may be

    @property
    def gpus(self) -> int:
        return self.scorer.layout.gpus * self.scorer.replicas


@dataclass(frozen=True)
class Plan:
    """What is known of a recipe before it is run."""

    planner: Planner
    layout: PlannedLayout  # the recipe's own
    gpus: int

    @cached_property
    def refusals(self) -> list[str]:
        """Why the recipe's own layout cannot work at all."""
        found = []
        if self.gpus != self.layout.gpus:
            ranks = self.layout.gpus // self.layout.data_parallel
            found.append(
                f"the recipe's {ranks} GPUs a copy (tensor x pipeline x context parallel) do not divide {self.gpus}"
            )
        for scorer in self.planner.teachers:
            if not scorer.colocated:
                found += layout_refusals(scorer.shape, scorer.layout, f"{scorer.key}.model: {scorer.model.name}")
        return found + self.planner.refusals(self.layout, names=True)

    @cached_property
    def unserved(self) -> list[str]:
        """Why the servers cannot write the student's responses."""
        servers = self.planner.servers
        if servers is None:
            return []
        student, work, limit = self.planner.student.shape, self.planner.work, self.planner.limit
        if found := layout_refusals(student, servers.layout, f"servers: {self.planner.student.name}"):
            return found
        room = servers.cached_tokens(student, work.student_element, limit * GiB)
        if room >= work.longest:
            return []
        held = servers.weights(student, work.student_element) / GiB
        return [
            f"servers.mem_fraction_static={servers.memory_fraction:g} of {limit:g} GiB holds the student's weights "
            f"({held:.1f} GiB a GPU) and {max(0, int(room)):,} tokens, fewer than the {work.longest:,} of a prompt and "
            "its response; raise servers.mem_fraction_static or servers.tensor_parallel"
        ]

    @cached_property
    def own(self) -> LayoutOption | None:
        return None if self.refusals else self.planner.option(self.layout, self.planner.work)

    @cached_property
    def fits(self) -> bool:
        """Whether the recipe can be run as it is."""
        fits = self.own is not None and self.planner.fits(self.own.memory)
        return fits and not self.too_large and not self.unserved

    @cached_property
    def elsewhere(self) -> list[SeparateTeacherPlan]:
        """The teachers that are not colocated, as the recipe has them."""
        return [self.planner.elsewhere(scorer) for scorer in self.planner.teachers if not scorer.colocated]

    @property
    def too_large(self) -> list[SeparateTeacherPlan]:
        """Of them those that their GPUs do not hold."""
        return [one for one in self.elsewhere if not self.planner.fits(one.memory)]

    @cached_property
    def together(self) -> LayoutSearch:
        """Layouts of the student and what is colocated with it."""
        return self.planner.search(self.gpus)

    @cached_property
    def alone(self) -> LayoutSearch:
        """The student's layouts without any teacher."""
        return self.planner.search(self.gpus, apart=True)

    @cached_property
    def separate(self) -> SeparateTeacherPlan | None:
        """The largest teacher on GPUs of its own."""
        return self.planner.separate(self.planner.largest_teacher)

    def overrides(self, option: LayoutOption) -> str:
        """What makes the recipe this option, ready to be pasted behind its other overrides."""
        return option.overrides(self.layout, self.planner.work)

    def remedy(self) -> str:
        """One line: why the recipe does not fit, the key to change, and to what."""
        planner = self.planner
        if self.own is None:
            why = self.refusals[0]
        elif self.unserved:
            return self.unserved[0]
        elif self.planner.fits(self.own.memory):
            return self._remedy_elsewhere(self.too_large[0])
        else:
            memory = self.own.memory
            why = (
                f"the recipe's layout needs {memory.peak / GiB:.1f} GiB of the {planner.limit:g} of a GPU "
                f"(most: {memory.largest.role} {memory.largest.name}, {memory.largest.bytes / GiB:.1f} GiB)"
            )
        if self.together.options:
            keys = self.overrides(self.together.options[0])
            return f"{why}; change {keys.partition('=')[0]}; the best layout that fits: {keys}"
        here = [scorer.key for scorer in planner.teachers if scorer.colocated]
        if share := self._server_share():
            return f"{why}; change servers.mem_fraction_static, to at most {share:g}"
        if not here:
            return f"{why}; no layout of {self.gpus} GPUs holds student.model: take more --gpus"
        return (
            f"{why}; no layout of {self.gpus} GPUs holds student.model and {', '.join(f'{key}.model' for key in here)} "
            f"together: take a smaller {here[0]}.model, more --gpus, or {here[0]}.placement=separate"
        )

    def _server_share(self) -> float:
        """Of a GPU, for colocated servers, that the recipe's layout leaves; 0: nothing can be won there."""
        if self.own is None or self.planner.servers is None or not self.planner.servers.colocated:
            return 0.0
        memory, limit = self.own.memory, self.planner.limit * GiB
        if memory.fullest != "generation" or any(memory.at(moment) > limit for moment in MEMORY_PHASES[1:]):
            return 0.0
        return max(0, int(100 * (1 - (memory.at("generation") - memory.of("generation")) / limit))) / 100

    def _remedy_elsewhere(self, one: SeparateTeacherPlan) -> str:
        scorer, found = one.scorer, self.planner.separate(one.scorer)
        size = "none tried" if found is None else f"{found.gpus}"
        return (
            f"{scorer.key}: a GPU of its own needs {one.memory.peak / GiB:.1f} GiB of {self.planner.limit:g}; change "
            f"{scorer.key}.tensor_parallel; the fewest GPUs that hold it: {size}"
        )


def _thriftier(work: Workload) -> Iterator[Workload]:
    """The recipe's own workload, and others that need less memory: what costs least time comes first."""
    distributed = replace(work, distributed_optimizer=True)
    for kept in dict.fromkeys((work, distributed, replace(distributed, recompute="full"))):
        for tokens in _halves(kept.micro_batch_tokens, kept.longest):
            for sequences in _halves(kept.rollout_batch, 1):
                yield replace(kept, micro_batch_tokens=tokens, rollout_batch=sequences)


def _halves(most: int, least: int) -> Iterator[int]:
    """most, and where it is above least its half, its quarter and so on, and at last least."""
    yield most
    half = most // 2
    while half > least:
        yield half
        half //= 2
    if most > least:
        yield least
