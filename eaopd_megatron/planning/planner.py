"""A recipe's plan: its own layout, and every other one of as many GPUs that fits, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property

from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.configs import Model
from eaopd_megatron.planning.hardware import Assumptions, GiB, Gpu
from eaopd_megatron.planning.layouts import Layout, faults, layouts
from eaopd_megatron.planning.memory import Colocated, Memory, separate_teacher
from eaopd_megatron.planning.shapes import ModelShape
from eaopd_megatron.planning.times import Clock
from eaopd_megatron.planning.workload import Workload

TEACHER_GPUS = (1, 2, 4, 8, 16, 32, 64)
KEYS = {
    **{field.name: f"student.{field.name}" for field in fields(Layout)},
    "recompute": "student.recompute",
    "distributed_optimizer": "optimizer.distributed",
    "micro_batch_tokens": "train.micro_batch_tokens",
    "rollout_batch": "rollout.batch_size",
}
"""What an option may change: fields of a layout and of a workload, and the recipe's keys for them."""
SAME_TIME = 0.02  # share by which estimates of time must differ to count
ROOM = 0.15  # share of a GPU that had better stay free


@dataclass(frozen=True)
class Option:
    """A layout with its micro-batch and rollout sizes: what it needs, and about how long it takes."""

    layout: Layout
    work: Workload
    memory: Memory
    seconds: dict[str, float]  # of an iteration: generation, teacher (scoring), student (forward, backward), ...

    @property
    def total(self) -> float:
        """Estimated seconds of an iteration."""
        return sum(self.seconds.values())

    def overrides(self, layout: Layout, work: Workload) -> str:
        """What makes a recipe of that layout and workload this option, ready to be pasted; its changes come first."""
        here, there = ({**asdict(one), **asdict(other)} for one, other in ((self.layout, self.work), (layout, work)))
        said = [name for name in KEYS if here[name] != there[name]]
        if "data_parallel" not in said:
            said.append("data_parallel")  # which the recipe may leave to the number of ranks
        return " ".join(f"{KEYS[name]}={str(here[name]).lower()}" for name in said)


@dataclass(frozen=True)
class Search:
    """What became of each layout of so many GPUs.

    options: those that fit, best first: by time, and of about the same time those with room enough. refused: those that
    cannot be cut, with a reason. too_large: the others, as the recipe would have them.
    """

    options: list[Option]
    refused: dict[Layout, str]
    too_large: list[Option]


@dataclass(frozen=True)
class Planner:
    """One pair of models on one kind of GPU."""

    student: Model
    teacher: Model
    work: Workload
    gpu: Gpu
    limit: float  # GiB of a GPU
    assumed: Assumptions = field(default_factory=Assumptions)

    @property
    def reserve(self) -> float:
        return self.assumed.reserve * GiB

    def fits(self, memory: Memory) -> bool:
        return memory.peak <= self.limit * GiB

    def clock(self, work: Workload) -> Clock:
        return Clock(self.gpu, self.assumed, work)

    def option(self, layout: Layout, work: Workload, *, teacher: bool = True) -> Option:
        """Memory and time of one choice. teacher: on the same GPUs; else it takes no memory and no time here."""
        shape = self.teacher.shape if teacher else None
        memory = Colocated(self.student.shape, shape, layout, work, self.reserve).memory()
        clock = self.clock(work)
        share = work.updates
        seconds = {"generation": clock.generation(self.student.shape, layout)}
        if shape is not None:
            seconds["teacher"] = share * clock.scoring(shape, layout, clock.tokens(layout))
        seconds["student"] = share * clock.update(self.student.shape, layout)
        seconds["optimiser"] = share * clock.step(self.student.shape, layout)
        seconds["weight sync"] = 0.0  # rollouts run on the weights that are trained
        return Option(layout, work, memory, seconds)

    def refusals(self, layout: Layout, *, teacher: bool = True) -> list[str]:
        """Why the student, or a teacher beside it, cannot be cut so. Expert parallelism is that of whoever has
        experts."""
        found = []
        for shape, role in self._roles(teacher):
            idle = not shape.experts and self._experts(teacher)
            found += faults(shape, layout.without_experts() if idle else layout, role)
        return found

    def _roles(self, teacher: bool) -> list[tuple[ModelShape, str]]:
        return [(self.student.shape, "student")] + ([(self.teacher.shape, "teacher")] if teacher else [])

    def _experts(self, teacher: bool) -> bool:
        """Whether any model on these GPUs has experts."""
        return any(shape.experts for shape, _ in self._roles(teacher))

    def search(self, gpus: int, *, teacher: bool = True) -> Search:
        """Every layout of so many GPUs."""
        found: list[Option] = []
        refused: dict[Layout, str] = {}
        too_large = []
        for layout in layouts(gpus, experts=self._experts(teacher)):
            if reasons := self.refusals(layout, teacher=teacher):
                refused[layout] = reasons[0]
            elif best := self._first(layout, teacher):
                found.append(best)
            else:
                too_large.append(self.option(layout, self.work, teacher=teacher))
        least = min((option.total for option in found), default=1.0)

        def rank(option: Option) -> tuple[int, float, float]:
            tight = max(0.0, option.memory.peak - (1 - ROOM) * self.limit * GiB)
            return int((option.total / least - 1) / SAME_TIME), tight, option.total

        return Search(sorted(found, key=rank), refused, too_large)

    def _first(self, layout: Layout, teacher: bool) -> Option | None:
        """The layout with the first of `_thriftier` workloads that fits."""
        for work in _thriftier(self.work):
            shape = self.teacher.shape if teacher else None
            if self.fits(Colocated(self.student.shape, shape, layout, work, self.reserve).memory()):
                return self.option(layout, work, teacher=teacher)
        return None

    def separate(self) -> Separate | None:
        """The teacher on the fewest GPUs of its own that hold it, in the quickest layout; none: on no number tried."""
        shape, work = self.teacher.shape, replace(self.work, signal="hidden")
        clock = self.clock(work)
        for gpus in TEACHER_GPUS:
            found = []
            for layout in layouts(gpus, experts=bool(shape.experts)):
                if faults(shape, layout, "teacher"):
                    continue
                memory = separate_teacher(shape, layout, work, self.reserve)
                if self.fits(memory):
                    tokens = work.prompts * clock.sequence / layout.data_parallel
                    rows = work.prompts * clock.response
                    answer = traffic.hidden_states(shape, rows, gpus, work.teacher_element)
                    seconds = clock.scoring(shape, layout, tokens, head=False) + clock.sent([answer])
                    found.append(Separate(shape, layout, memory, seconds, answer))
            if found:
                return min(found, key=lambda option: (option.seconds, option.memory.peak))
        return None


@dataclass(frozen=True)
class Separate:
    """A teacher on GPUs of its own."""

    shape: ModelShape
    layout: Layout
    memory: Memory
    seconds: float  # of an iteration
    answer: traffic.Flow


@dataclass(frozen=True)
class Plan:
    """What is known of a recipe before it is run."""

    planner: Planner
    layout: Layout  # the recipe's own
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
        return found + self.planner.refusals(self.layout)

    @cached_property
    def own(self) -> Option | None:
        return None if self.refusals else self.planner.option(self.layout, self.planner.work)

    @cached_property
    def fits(self) -> bool:
        """Whether the recipe can be run as it is."""
        return self.own is not None and self.planner.fits(self.own.memory)

    @cached_property
    def together(self) -> Search:
        """Layouts of student and teacher."""
        return self.planner.search(self.gpus)

    @cached_property
    def alone(self) -> Search:
        """The student's layouts without the teacher."""
        return self.planner.search(self.gpus, teacher=False)

    @cached_property
    def separate(self) -> Separate | None:
        """The teacher on GPUs of its own."""
        return self.planner.separate()

    def overrides(self, option: Option) -> str:
        """What makes the recipe this option, ready to be pasted behind its other overrides."""
        return option.overrides(self.layout, self.planner.work)

    def remedy(self) -> str:
        """One line: why the recipe does not fit, the key to change, and to what."""
        planner = self.planner
        if self.own is None:
            why = self.refusals[0]
        else:
            memory = self.own.memory
            why = (
                f"the recipe's layout needs {memory.peak / GiB:.1f} GiB of the {planner.limit:g} of a GPU "
                f"(most: {memory.largest.role} {memory.largest.name}, {memory.largest.bytes / GiB:.1f} GiB)"
            )
        if self.together.options:
            keys = self.overrides(self.together.options[0])
            return f"{why}; change {keys.partition('=')[0]}; the best layout that fits: {keys}"
        return (
            f"{why}; no layout of {self.gpus} GPUs holds student.model and teacher.model together: "
            "take a smaller teacher.model or more --gpus"
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
