"""A recipe's plan: its own layout, and every other one of as many GPUs that fits, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property

from eaopd_megatron.models.supported import ModelInfo, separate_layout
from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.activations import gpu_layer_path
from eaopd_megatron.planning.memory import MEMORY_PHASES, GpuMemory, StudentGpus, remote_teacher_memory
from eaopd_megatron.planning.times import GiB, GpuSpec, TimeAssumptions, TimeEstimates
from eaopd_megatron.planning.workload import (
    PlannedLayout,
    PlannedServers,
    PlannedTeacher,
    Workload,
    enumerate_layouts,
    layout_refusals,
)

TEACHER_GPUS = (1, 2, 4, 8, 16, 32, 64)
_OVERRIDE_KEYS = {
    **{field.name: f"student.{field.name}" for field in fields(PlannedLayout)},
    "recompute": "student.recompute",
    "distributed_optimizer": "optimizer.distributed",
    "micro_batch_tokens": "train.micro_batch_tokens",
    "rollout_batch": "rollout.batch_size",
}
"""Fields of a layout and of a workload that an option may change, and the recipe's keys for them."""
_EQUAL_TIME_SHARE = 0.02  # estimates of time that differ by less count as equal
_FREE_SHARE = 0.15  # share of a GPU that should stay free


@dataclass(frozen=True)
class LayoutOption:
    """A layout with its micro-batch and rollout sizes: its memory and estimated time."""

    layout: PlannedLayout
    work: Workload
    memory: GpuMemory
    seconds: dict[str, float]  # per iteration: generation, teacher (scoring), student (forward, backward), ...
    ahead: bool = False  # generation overlaps with the rest

    @property
    def total(self) -> float:
        """Estimated seconds of an iteration."""
        generation, total = self.seconds["generation"], sum(self.seconds.values())
        return max(generation, total - generation) if self.ahead else total


@dataclass(frozen=True)
class LayoutSearch:
    """The layouts of a number of GPUs.

    options: those that fit, best first: by time, among equal times those that leave room. unsupported: those that
    cannot hold the models, with a reason. too_large: the others, with the recipe's workload.
    """

    options: list[LayoutOption]
    unsupported: dict[PlannedLayout, str]
    too_large: list[LayoutOption]


@dataclass(frozen=True)
class SeparateTeacherPlan:
    """A teacher on GPUs of its own."""

    teacher: PlannedTeacher
    memory: GpuMemory
    seconds: float  # per iteration
    sent: float  # bytes of its outputs per iteration, if all responses are as long as allowed

    @property
    def gpus(self) -> int:
        return self.teacher.layout.gpus * self.teacher.replicas


@dataclass(frozen=True)
class Planner:
    """A student and its teachers on one kind of GPU."""

    student: ModelInfo
    teachers: tuple[PlannedTeacher, ...]
    work: Workload
    gpu: GpuSpec
    limit: float  # GiB of a GPU
    assumed: TimeAssumptions = field(default_factory=TimeAssumptions)
    servers: PlannedServers | None = None  # None: the trainer generates
    transformer_engine: bool = True  # on the GPUs

    def fits(self, memory: GpuMemory) -> bool:
        return memory.peak <= self.limit * GiB

    def clock(self, work: Workload) -> TimeEstimates:
        return TimeEstimates(self.gpu, self.assumed, work)

    def memory(self, layout: PlannedLayout, work: Workload) -> GpuMemory:
        """Return the memory of the student's fullest GPU."""
        path = gpu_layer_path(work.student_element, transformer_engine=self.transformer_engine)
        ours = StudentGpus(self.student.shape, self.teachers, layout, work, self.assumed.reserve * GiB, path)
        if self.servers and self.servers.colocated:
            server = self.servers.mem_fraction_static * self.limit * GiB
            contexts = (self.servers.gpus - self.servers.tensor_parallel) * self.assumed.server_context
            process = (self.assumed.server_process + contexts) * GiB  # on the first GPU
            ours = replace(ours, writer="colocated servers", server=server, process=process)
        elif self.servers:
            ours = replace(ours, writer="servers elsewhere")
        return ours.memory()

    def option(self, layout: PlannedLayout, work: Workload) -> LayoutOption:
        """Return memory and time of one choice. Remote teachers take no time: they score during generation."""
        clock, student, servers = self.clock(work), self.student.shape, self.servers
        generation = clock.served(student, servers, self.limit * GiB) if servers else clock.generation(student, layout)
        seconds = {"generation": generation}
        if here := [teacher for teacher in self.teachers if teacher.colocated]:
            seconds["teacher"] = sum(self._scoring(teacher, layout, clock, len(here)) for teacher in here)
        seconds["student"] = work.updates * clock.update(student, layout)
        seconds["optimiser"] = work.updates * clock.step(student, layout)
        seconds["weight sync"] = 0.0 if servers is None else clock.sent([self.weight_sync(servers, layout)])
        ahead = servers is not None and servers.ahead
        return LayoutOption(layout, work, self.memory(layout, work), seconds, ahead=ahead)

    def weight_sync(self, servers: PlannedServers, layout: PlannedLayout) -> traffic.TrafficFlow:
        """Return the traffic of an iteration's weight update."""
        span = layout.gpus if servers.colocated else layout.gpus + servers.gpus
        return traffic.weight_sync_traffic(self.student.shape, servers.count, self.work.student_element, span)

    def _scoring(self, teacher: PlannedTeacher, layout: PlannedLayout, clock: TimeEstimates, teachers: int) -> float:
        """Estimate a teacher's seconds per iteration; several teachers share the responses equally."""
        updates, tokens = clock.work.updates, clock.tokens(layout) / teachers
        seconds = updates * clock.scoring(teacher.shape, layout, tokens, element=teacher.element)
        if teacher.offloaded:
            times = 1 if teacher.signal == "topk" else updates
            seconds += times * clock.fetched(teacher.weights(layout, 0, self.student.shape.vocab))
        return seconds

    def refusals(self, layout: PlannedLayout, *, names: bool = False) -> list[str]:
        """Return why the layout cannot hold the student or a colocated teacher. names: with the models' names.

        Expert parallelism applies to the models that have experts.
        """
        found, experts = [], self._has_experts
        for key, model in self._colocated_models.items():
            its = layout.without_experts() if experts and not model.shape.experts else layout
            found += layout_refusals(model.shape, its, f"{key}.model: {model.name}" if names else f"{key}.model")
        return found

    @property
    def _colocated_models(self) -> dict[str, ModelInfo]:
        """The models on the student's GPUs by their section of the recipe."""
        return {"student": self.student, **{one.key: one.model for one in self.teachers if one.colocated}}

    @property
    def _has_experts(self) -> bool:
        return any(model.shape.experts for model in self._colocated_models.values())

    def search(self, gpus: int) -> LayoutSearch:
        """Try every layout of `gpus` GPUs."""
        fitting: list[LayoutOption] = []
        unsupported: dict[PlannedLayout, str] = {}
        too_large = []
        for layout in enumerate_layouts(gpus, experts=self._has_experts):
            if reasons := self.refusals(layout):
                unsupported[layout] = reasons[0]
                continue
            for work in _smaller_workloads(self.work):
                if self.fits(self.memory(layout, work)):
                    fitting.append(self.option(layout, work))
                    break
            else:
                too_large.append(self.option(layout, self.work))
        fastest = min((option.total for option in fitting), default=1.0)

        def rank(option: LayoutOption) -> tuple[int, float, float]:
            excess = max(0.0, option.memory.peak - (1 - _FREE_SHARE) * self.limit * GiB)
            return int((option.total / fastest - 1) / _EQUAL_TIME_SHARE), excess, option.total

        return LayoutSearch(sorted(fitting, key=rank), unsupported, too_large)

    @property
    def largest_teacher(self) -> PlannedTeacher:
        return max(self.teachers, key=lambda teacher: teacher.shape.hf_parameters().total)

    def separate(self, teacher: PlannedTeacher) -> SeparateTeacherPlan | None:
        """Return the teacher on the fewest GPUs of its own that hold it, in the fastest layout; None if none does."""
        shape = teacher.shape
        for gpus in TEACHER_GPUS:
            layouts = enumerate_layouts(gpus, experts=bool(shape.experts))
            supported = (layout for layout in layouts if not layout_refusals(shape, layout))
            plans = [self.elsewhere(replace(teacher.on_own_gpus(), layout=layout)) for layout in supported]
            if fitting := [plan for plan in plans if self.fits(plan.memory)]:
                return min(fitting, key=lambda plan: (plan.seconds, plan.memory.peak))
        return None

    def elsewhere(self, teacher: PlannedTeacher) -> SeparateTeacherPlan:
        """Return the plan of a teacher that is not colocated, in its own layout."""
        work, layout, clock = self.work, teacher.layout, self.clock(self.work)
        memory = remote_teacher_memory(teacher, work, self.assumed.reserve * GiB, self.limit * GiB)
        tokens = work.prompts * clock.sequence / layout.data_parallel / teacher.replicas
        sent = work.prompts * clock.response * teacher.bytes_per_token / (layout.gpus * teacher.replicas)
        payload = traffic.TrafficFlow("teacher's answers (HTTP)", sent, traffic.ACROSS_HOSTS)
        head = teacher.signal == "topk"
        seconds = clock.scoring(teacher.shape, layout, tokens, head=head, element=teacher.element)
        most = work.prompts * work.longest_response * teacher.bytes_per_token
        return SeparateTeacherPlan(teacher, memory, seconds + clock.sent([payload]), most)


@dataclass(frozen=True)
class Plan:
    """What is known of a recipe before it runs. layout: the recipe's own."""

    planner: Planner
    layout: PlannedLayout
    gpus: int

    @cached_property
    def refusals(self) -> list[str]:
        """Why the recipe's own layout cannot work at all."""
        found = []
        if self.gpus != self.layout.gpus:
            ranks = self.layout.gpus // self.layout.data_parallel
            product = f"{ranks} GPUs a copy (tensor x pipeline x context parallel)"
            found.append(f"the recipe's {product} do not divide {self.gpus}")
        for teacher in self.planner.teachers:
            if not teacher.colocated:
                found += layout_refusals(teacher.shape, teacher.layout, teacher.label)
        return found + self.planner.refusals(self.layout, names=True)

    @cached_property
    def server_refusals(self) -> list[str]:
        """Why the servers cannot generate the student's responses."""
        planner, servers = self.planner, self.planner.servers
        if servers is None:
            return []
        student, work, limit = planner.student.shape, planner.work, planner.limit
        layout = separate_layout(servers.layout, has_experts=bool(student.experts))
        if found := layout_refusals(student, layout, f"servers: {planner.student.name}"):
            return found
        room = servers.cached_tokens(student, work.student_element, limit * GiB)
        if room >= work.longest:
            return []
        weights = servers.weights(student, work.student_element) / GiB
        return [
            f"servers.mem_fraction_static={servers.mem_fraction_static:g} of {limit:g} GiB holds the student's weights "
            f"({weights:.1f} GiB a GPU) and {max(0, int(room)):,} tokens, fewer than the {work.longest:,} of a prompt "
            "and its response; raise servers.mem_fraction_static or servers.tensor_parallel"
        ]

    @cached_property
    def own(self) -> LayoutOption | None:
        """The recipe's own layout; None if it cannot work."""
        return None if self.refusals else self.planner.option(self.layout, self.planner.work)

    @cached_property
    def fits(self) -> bool:
        """Whether the recipe can run as it is."""
        fits = self.own is not None and self.planner.fits(self.own.memory)
        return fits and not self.too_large and not self.server_refusals

    @cached_property
    def elsewhere(self) -> list[SeparateTeacherPlan]:
        """The teachers that are not colocated, as the recipe has them."""
        return [self.planner.elsewhere(teacher) for teacher in self.planner.teachers if not teacher.colocated]

    @property
    def too_large(self) -> list[SeparateTeacherPlan]:
        """Those of `elsewhere` that do not fit on their GPUs."""
        return [plan for plan in self.elsewhere if not self.planner.fits(plan.memory)]

    @cached_property
    def together(self) -> LayoutSearch:
        """Layouts of the student and what is colocated with it."""
        return self.planner.search(self.gpus)

    @cached_property
    def alone(self) -> LayoutSearch:
        """The student's layouts with every teacher on GPUs of its own."""
        teachers = tuple(teacher.on_own_gpus() for teacher in self.planner.teachers)
        return replace(self.planner, teachers=teachers).search(self.gpus)

    @cached_property
    def separate(self) -> SeparateTeacherPlan | None:
        """The largest teacher on GPUs of its own."""
        return self.planner.separate(self.planner.largest_teacher)

    def overrides(self, option: LayoutOption) -> str:
        """Return the overrides that turn the recipe into this option; changes come first."""
        ours, theirs = {**asdict(self.layout), **asdict(self.planner.work)}, asdict(option.layout) | asdict(option.work)
        names = [name for name in _OVERRIDE_KEYS if ours[name] != theirs[name]]
        if "data_parallel" not in names:
            names.append("data_parallel")  # the recipe may leave it to the number of ranks
        return " ".join(f"{_OVERRIDE_KEYS[name]}={str(theirs[name]).lower()}" for name in names)

    def remedy(self) -> str:
        """Return one line: why the recipe does not fit, the key to change, and its new value."""
        planner = self.planner
        if self.own is None:
            why = self.refusals[0]
        elif self.server_refusals:
            return self.server_refusals[0]
        elif planner.fits(self.own.memory):
            return self._separate_remedy(self.too_large[0])
        else:
            memory = self.own.memory
            why = (
                f"the recipe's layout needs {memory.peak / GiB:.1f} GiB of the {planner.limit:g} of a GPU "
                f"(most: {memory.largest.role} {memory.largest.name}, {memory.largest.bytes / GiB:.1f} GiB)"
            )
        if self.together.options:
            keys = self.overrides(self.together.options[0])
            return f"{why}; change {keys.partition('=')[0]}; the best layout that fits: {keys}"
        if share := self._server_share():
            return f"{why}; change servers.mem_fraction_static, to at most {share:g}"
        here = [teacher.key for teacher in planner.teachers if teacher.colocated]
        if not here:
            return f"{why}; no layout of {self.gpus} GPUs holds student.model: take more --gpus"
        return (
            f"{why}; no layout of {self.gpus} GPUs holds student.model and {', '.join(f'{key}.model' for key in here)} "
            f"together: take a smaller {here[0]}.model, more --gpus, or {here[0]}.placement=separate"
        )

    def _server_share(self) -> float:
        """Return the GPU fraction that the recipe's layout leaves for colocated servers; 0 if it would not help."""
        if self.own is None or self.planner.servers is None or not self.planner.servers.colocated:
            return 0.0
        memory, limit = self.own.memory, self.planner.limit * GiB
        if memory.fullest != "generation" or any(memory.at(phase) > limit for phase in MEMORY_PHASES[1:]):
            return 0.0
        return max(0, int(100 * (1 - (memory.at("generation") - memory.of("generation")) / limit))) / 100

    def _separate_remedy(self, plan: SeparateTeacherPlan) -> str:
        key, found = plan.teacher.key, self.planner.separate(plan.teacher)
        needed = f"{key}: a GPU of its own needs {plan.memory.peak / GiB:.1f} GiB of {self.planner.limit:g}"
        size = "none tried" if found is None else found.gpus
        return f"{needed}; change {key}.tensor_parallel; the fewest GPUs that hold it: {size}"


def _smaller_workloads(work: Workload) -> Iterator[Workload]:
    """Yield the recipe's workload and others that need less memory; those that cost least time come first."""
    distributed = replace(work, distributed_optimizer=True)
    for base in dict.fromkeys((work, distributed, replace(distributed, recompute="full"))):
        for tokens in _halves(base.micro_batch_tokens, base.longest):
            for sequences in _halves(base.rollout_batch, 1):
                yield replace(base, micro_batch_tokens=tokens, rollout_batch=sequences)


def _halves(most: int, least: int) -> Iterator[int]:
    """Yield `most`, its half, its quarter and so on while above `least`; then `least`, or a smaller `most`."""
    last = min(most, least)
    while most > least:
        yield most
        most //= 2
    yield last
