"""A recipe's plan: its own layout, and every other one of as many GPUs that fits, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
SAME_TIME = 0.02  # share by which estimates of time must differ to count


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

    def overrides(self, recipe: Workload) -> str:
        """What makes the recipe this option, ready to be pasted."""
        said = self.layout.overrides()
        if self.work.micro_batch_tokens != recipe.micro_batch_tokens:
            said.append(f"train.micro_batch_tokens={self.work.micro_batch_tokens}")
        if self.work.rollout_batch != recipe.rollout_batch:
            said.append(f"rollout.batch_size={self.work.rollout_batch}")
        return " ".join(said)


@dataclass(frozen=True)
class Search:
    """What became of each layout of so many GPUs.

    options: those that fit, best first: the least time, and of about the same time the most room. refused: those that
    cannot be cut, with a reason. too_large: the others, with the recipe's own micro-batches.
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
        """Why neither the student nor a teacher beside it can be cut so."""
        found = faults(self.student.shape, layout)
        return found + (faults(self.teacher.shape, layout, "teacher") if teacher else [])

    def search(self, gpus: int, *, teacher: bool = True) -> Search:
        """Every layout of so many GPUs."""
        found: list[Option] = []
        refused: dict[Layout, str] = {}
        too_large = []
        for layout in layouts(gpus, experts=bool(self.student.shape.experts)):
            if reasons := self.refusals(layout, teacher=teacher):
                refused[layout] = reasons[0]
            elif best := self._largest(layout, teacher):
                found.append(best)
            else:
                too_large.append(self.option(layout, self.work, teacher=teacher))
        least = min((option.total for option in found), default=1.0)
        found.sort(key=lambda option: (int((option.total / least - 1) / SAME_TIME), option.memory.peak))
        return Search(found, refused, too_large)

    def _largest(self, layout: Layout, teacher: bool) -> Option | None:
        """The layout with the largest micro-batches, then rollout batches, that fit; the recipe's at most."""
        for tokens in _halves(self.work.micro_batch_tokens, self.work.longest):
            for sequences in _halves(self.work.rollout_batch, 1):
                work = replace(self.work, micro_batch_tokens=tokens, rollout_batch=sequences)
                memory = Colocated(
                    self.student.shape, self.teacher.shape if teacher else None, layout, work, self.reserve
                ).memory()
                if self.fits(memory):
                    return self.option(layout, work, teacher=teacher)
                if memory.fullest != "generation":
                    break  # fewer sequences would not help
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
            keys = self.together.options[0].overrides(planner.work).split()
            own = self.own.overrides(planner.work).split() if self.own else []
            changed = next((part for part in keys if part not in own), keys[0]).partition("=")[0]
            return f"{why}; change {changed}; the best layout that fits: {' '.join(keys)}"
        return (
            f"{why}; no layout of {self.gpus} GPUs holds student.model and teacher.model together: "
            "take a smaller teacher.model or more --gpus"
        )


def _halves(most: int, least: int) -> Iterator[int]:
    """most, its half, ... down to least; least itself where most is below it."""
    yield most
    while (most := most // 2) >= least:
        yield most
