"""The state of a run: its components, its progress, and what it records after each iteration."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_export import export_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.data.prompts import PromptCursor
from eaopd_megatron.data.types import Sample
from eaopd_megatron.distributed.broadcast import wait_on_all_ranks
from eaopd_megatron.distributed.collective_errors import run_on_main_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import ServiceUnavailable, StopRequested, UserError
from eaopd_megatron.evaluation.results import result_file_name
from eaopd_megatron.launch.entrypoint import must_complete
from eaopd_megatron.models.supported import check_context
from eaopd_megatron.reporting.alerts import AlertMonitor, alert_rules
from eaopd_megatron.reporting.metrics_log import MetricsWriter
from eaopd_megatron.reporting.progress import Progress
from eaopd_megatron.reporting.run_report import summary_line, write_run_report
from eaopd_megatron.rollout.interface import GenerationRequest, RolloutHandle
from eaopd_megatron.training.checkpointing import TrainingCheckpoints
from eaopd_megatron.training.components import build_components, build_prompt_builder, load_training_problems
from eaopd_megatron.training.measurement import MetricAccumulator, ProfilerWindow, ThroughputMeter
from eaopd_megatron.training.run_folder import RunFolder, check_inputs
from eaopd_megatron.training.schedule import LearningRateSchedule, ObjectiveSchedule
from eaopd_megatron.utils.environment import describe_environment
from eaopd_megatron.utils.files import atomic_write

_SAMPLE_FLOPS = "sample_flops"  # averaged like a metric but not recorded
_INTERRUPTIBLE_PHASES = ("rollout", "evaluation")
"""Phases that a stop signal ends. The others last to their end: a stopped iteration that has updates is completed."""


class Interrupted(SystemExit):
    """A signal asked the run to stop and its checkpoint is written. The launcher reports it; it is not an error."""


class Trainer:
    """A run on this rank. `iteration` and `updates` count completed iterations and updates."""

    def __init__(self, recipe: Recipe, parallel: ParallelState) -> None:
        self.recipe, self.parallel = recipe, parallel
        self.folder = RunFolder(Path(recipe.run.folder))
        self.progress = self._open_progress()
        teachers = ", ".join(
            f"teacher {f'{name} ' if name else ''}{_relative(one.model)}"
            for name, one in recipe.named_teachers().items()
        )
        models = f"student {_relative(recipe.student.model)}, {teachers}"
        self.log(f"{models}: loading on {parallel.world_size} ranks")
        self._signal: int | None = None
        run_on_main_or_raise(parallel, lambda: check_inputs(recipe, hub=True))
        self.components = build_components(
            recipe, parallel, self.folder, stop_signal=lambda: self._signal or 0, log=self.log
        )
        self.student, self.teachers = self.components.student, self.components.teachers
        names = recipe.model_names()
        opened = {key: (names[key], folder.path) for key, folder in self.components.folders.items()}
        self._models = run_on_main_or_raise(parallel, lambda: self.folder.check_models(opened)) or {}
        report = self.folder.path / "decontamination.json" if parallel.is_main else None
        problems = load_training_problems(recipe.data, report, self.log)
        self._teacher_model = {name: one.model for name, one in recipe.named_teachers().items()}
        builder = build_prompt_builder(recipe.data, self.components.tokenizer, list(self._teacher_model))
        self.prompts, dropped = builder.build(problems, recipe.data.source)
        check_context(recipe, self.components.positions, max(len(prompt.token_ids) for prompt in self.prompts))
        if dropped:
            self.log(
                f"{dropped} prompts are longer than data.max_prompt_tokens={recipe.data.max_prompt_tokens}: left out"
            )
        if misread := sum(not set(self.components.masked_ids).isdisjoint(p.token_ids) for p in self.prompts):
            self.log(f"{misread} prompts hold tokens that a teacher reads as others (teacher.tokenizer_check=shared)")
        data, train, options, objective = recipe.data, recipe.train, recipe.optimizer, recipe.objective
        self.cursor = PromptCursor(
            len(self.prompts), train.prompts_per_iteration, recipe.seed, data.shuffle, data.last_batch
        )
        updates = sum(-(-self.cursor.size(i) // train.mini_batch) for i in range(train.iterations))
        self.schedule = LearningRateSchedule(
            options.lr, updates, options.schedule, options.warmup_updates, options.lr * options.min_lr_ratio
        )
        start, ramp_updates = objective.build_objective(), objective.ramp_updates or updates
        self.objective = ObjectiveSchedule(
            start, ramp_updates, objective.ramp, objective.threshold_end, objective.forward_weight_end
        )
        self.metrics = MetricAccumulator()
        self.alerts = AlertMonitor(alert_rules(recipe.rollout, recipe.train.updates_per_iteration, recipe.teachers))
        self.throughput = ThroughputMeter(self.components.student_folder.config, parallel.world_size)
        window = (recipe.reporting.profile_from, recipe.reporting.profile_iterations)
        self.profiler = ProfilerWindow(self.folder.profile, parallel.rank, *window)
        self._writer: MetricsWriter | None = None
        self._times: dict[str, float] = defaultdict(float)
        self._prefetched: RolloutHandle | None = None  # the next iteration's responses, requested in advance
        self.checkpoints = TrainingCheckpoints(recipe, parallel, self.folder, self.components, self.prompts)
        self.iteration, self.updates = self.checkpoints.resume(self.log)
        self._saved = self.iteration
        self._open_records()

    def start(self) -> None:
        """Start or connect to the rollout servers and teachers; install the signal handlers."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        rollout = self.recipe.rollout
        longest = max(len(p.token_ids) for p in self.prompts) + rollout.max_response_tokens
        evaluator = self.components.evaluator
        self.components.rollout.open([*self.prompts, *evaluator.prompts()], max(longest, evaluator.longest()))
        self.teachers.open(longest)

    # Algorithm 1

    def update_weights(self) -> None:
        """Send the student's weights to the rollout engine."""
        self.profiler.begin(self.iteration + 1)
        self._update_weights()

    def generate(self) -> Iterator[list[Sample]]:
        """Yield this rank's share of the iteration's responses in parts as they finish; equally many on every rank."""
        handle, self._prefetched = self._prefetched or self._submit(self.iteration), None
        parts = self.components.rollout.collect(handle)
        while True:
            with self.timer("rollout"):
                part = next(parts, None)
            if part is None:
                break
            yield [
                replace(
                    sample,
                    teacher=self._teacher_model[sample.prompt.teacher],
                    stale=sample.weight_version != self.updates,
                )
                for sample in part
            ]
        self.components.rollout.finish_generation()
        if self.recipe.rollout.max_staleness and self.iteration + 1 < self.recipe.train.iterations:
            self._prefetched = self._submit(self.iteration + 1)

    def _submit(self, iteration: int) -> RolloutHandle:
        mini, indices = self.recipe.train.mini_batch, self.cursor.indices(iteration)
        request = GenerationRequest(
            [self.prompts[index] for index in indices],
            [(self.recipe.seed, "rollout", iteration, i) for i in range(len(indices))],
            [i for i in range(len(indices)) if i % mini % self.parallel.dp_size == self.parallel.dp_rank],
            self.components.sampling,
        )
        return self.components.rollout.submit(request)

    def _update_weights(self) -> None:
        with self.timer("sync"):
            self.components.rollout.update_weights(self.updates)

    @property
    def updates_per_iteration(self) -> int:
        """Number of updates (mini-batches) of the current iteration."""
        return -(-self.cursor.size(self.iteration) // self.recipe.train.mini_batch)

    def mini_batches(self, samples: list[Sample]) -> list[list[Sample]]:
        """Return this rank's (possibly empty) share of each mini-batch; equally many on every rank."""
        mini, count = self.recipe.train.mini_batch, self.updates_per_iteration
        ordered = sorted(samples, key=lambda sample: sample.index)
        return [[s for s in ordered if s.index // mini == number] for number in range(count)]

    @contextlib.contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to the iteration's time/<phase>."""
        start = time.perf_counter()
        with contextlib.nullcontext() if phase in _INTERRUPTIBLE_PHASES else must_complete():
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times[phase] += time.perf_counter() - start

    def stop_if_requested(self) -> None:
        """Raise StopRequested on all ranks if one got a signal. Collective. Not after an iteration's first update."""
        wait_on_all_ranks(self.parallel, lambda: True, lambda: self._signal or 0)

    def finish_iteration(self, samples: list[Sample]) -> None:
        """Record the iteration, evaluate and save if due, and stop if a signal was received."""
        self.profiler.end()
        self._measure(samples)
        self.iteration += 1
        record = self.metrics.reduce(dist.group.WORLD)
        self.metrics = MetricAccumulator()
        record |= self.checkpoints.changed
        self.checkpoints.changed = {}
        for line in self.alerts.check(record):
            self.log(line)
        self._write_rollouts(samples)
        last = self.iteration == self.recipe.train.iterations
        try:
            if self._evaluation_is_due():
                record |= self._evaluation()
        except (StopRequested, ServiceUnavailable):  # the resumed run repeats the evaluation
            self._record(record | self._rates(record))
            raise
        self._record(record | self._rates(record))
        stop_signal = self._reduce_signal()
        save = self.recipe.run.save_interval
        if last or stop_signal or (save and self.iteration % save == 0):
            with self.timer("checkpoint"):
                self._save(wait=bool(last or stop_signal))
        if stop_signal and not last:
            self._interrupt(stop_signal)

    def save_and_stop(self, reason: StopRequested | ServiceUnavailable) -> NoReturn:
        """Save the completed iterations, as the current one cannot be finished. Raises Interrupted or UserError."""
        self.components.rollout.close()
        self.teachers.close()
        self.components.rollout.finish_generation()
        with must_complete():
            self._save(wait=True)
        if isinstance(reason, StopRequested):
            self._interrupt(reason.args[0])
        raise UserError(f"{reason}; {self._progress_text()}")

    def _save(self, *, wait: bool) -> None:
        if self._saved < self.iteration:
            self.checkpoints.save(self.iteration, self.updates)
            self._saved = self.iteration
        if wait:
            self.checkpoints.store.wait()

    def _interrupt(self, number: int) -> NoReturn:
        self.log(f"stopped: {self._progress_text()}")
        raise Interrupted(128 + number)

    def _progress_text(self) -> str:
        saved = f"the run is saved after iteration {self.iteration}" if self.iteration else "nothing was trained yet"
        return f"{saved}; the same command continues"

    def evaluate_if_due(self) -> None:
        """Evaluate before training, or repeat the evaluation during which the run was stopped."""
        missing = torch.tensor([not (self.folder.evaluation / result_file_name(self.iteration)).exists()])
        missing = missing.to(self.parallel.device)
        dist.broadcast(missing, 0)
        interrupted = self.components.evaluator.benchmarks and self._evaluation_is_due() and bool(missing)
        if not self.iteration or interrupted:
            self._record(self._evaluation())
            self._times.clear()

    def _evaluation_is_due(self) -> bool:
        interval = self.recipe.evaluation.interval
        return self.iteration == self.recipe.train.iterations or bool(interval and self.iteration % interval == 0)

    def finish(self) -> None:
        """Export the student, write the report and mark the run as finished. Collective.

        Each step can be repeated, so a run that is killed here continues here.
        """
        self.log(f"exporting the student to {self.folder.student}")
        export_hf(self.components.model, self.parallel, self.components.student_folder, self.folder.student)
        dist.barrier()
        if not self.parallel.is_main:
            return
        self.close()
        report = write_run_report(self.folder.path)
        self.folder.finish(self.recipe)
        print(
            f"finished: {summary_line(self.folder.path)}\nreport: {report}\nstudent: {self.folder.student}", flush=True
        )

    def close(self) -> None:
        """Close files, rollout engine and teachers. Idempotent."""
        if self._writer:
            self._writer.close()
        if self.progress:
            self.progress.__exit__(None, None, None)
        self._writer, self.progress = None, None
        self.components.rollout.close()
        self.teachers.close()

    # Records of an iteration

    def _measure(self, samples: list[Sample]) -> None:
        if not self.parallel.reports_metrics or self.parallel.cp_rank:  # context-parallel ranks have the same samples
            return
        add = self.metrics.add
        add("rollout/length", torch.tensor([len(s.response_ids) for s in samples]))
        add("rollout/stopped", torch.tensor([s.finish_reason == "stop" for s in samples]))
        add("rollout/truncated", torch.tensor([s.finish_reason == "length" for s in samples]))
        if self.components.vocab_size < self.components.student_folder.vocab_size:
            add("rollout/foreign_tokens", torch.tensor([s.foreign_tokens for s in samples]))
        start = self.updates - len(self.mini_batches(samples))
        add("rollout/version_lag", torch.tensor([start - s.weight_version for s in samples]))
        add(_SAMPLE_FLOPS, self.throughput.sample_flops(samples))
        masses = [s.teacher_top_k.logprobs.exp().sum(-1) for s in samples if s.teacher_top_k is not None]
        if masses:
            add("teacher/topk_mass", torch.cat(masses))

    def _rates(self, record: dict[str, float]) -> dict[str, float]:
        rates = {f"time/{phase}": seconds for phase, seconds in self._times.items()}
        responses, flops = self.cursor.size(self.iteration - 1), record.pop(_SAMPLE_FLOPS)
        rates |= self.throughput.rates(self._times, responses, record["rollout/length"], flops)
        rates["memory/peak"] = float(
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        self._times.clear()
        return rates

    def _evaluation(self) -> dict[str, float]:
        evaluator = self.components.evaluator
        if evaluator.benchmarks:
            self._update_weights()
        with self.timer("evaluation"):
            result = evaluator.run(self.iteration, self.log)
            self.components.rollout.finish_generation()
            if result is None:  # not the main rank
                return {}
            result.write(self.folder.evaluation)
            return result.to_metrics()

    def _write_rollouts(self, samples: list[Sample]) -> None:
        count = self.recipe.run.log_rollouts
        if not self.parallel.is_main or not count:
            return
        decode = self.components.tokenizer.decode
        first = sorted(samples, key=lambda sample: sample.index)[:count]
        lines = [json.dumps(s.record(decode(s.response_ids))) for s in first]
        atomic_write(self.folder.rollouts / f"{self.iteration:06d}.jsonl", "\n".join(lines) + "\n")

    def _record(self, figures: dict[str, float]) -> None:
        if self._writer and self.progress:
            record: dict[str, Any] = {"iteration": self.iteration, "update": self.updates, **figures}
            self._writer.write(record)
            self.progress.update(record)

    # Start and stop

    def _open_progress(self) -> Progress | None:
        if not self.parallel.is_main:
            return None
        self.folder.path.mkdir(parents=True, exist_ok=True)
        progress = Progress(self.recipe.train.iterations, 0, self.folder.log)
        progress.__enter__()
        return progress

    def _open_records(self) -> None:
        if not self.parallel.is_main:
            return
        self.folder.write_config(self.recipe)
        self.folder.finished_file.unlink(missing_ok=True)
        self.folder.write_models(self._models)
        atomic_write(self.folder.path / "environment.json", json.dumps(describe_environment(), indent=1) + "\n")
        options = self.recipe.reporting
        wandb = {"project": options.wandb_project, "name": options.wandb_name, "config": self.recipe.model_dump()}
        resumed = self.iteration if self.iteration else None
        self._writer = MetricsWriter(self.folder.path, options.tensorboard, wandb if options.wandb else None, resumed)
        if resumed:
            self.log(f"continuing after iteration {self.iteration}")

    def log(self, text: str) -> None:
        """Write a line to the run's log and stdout, on the main rank."""
        if self.progress:
            self.progress.message(text)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number

    def _reduce_signal(self) -> int:
        """Return the highest signal number that any rank received, or 0. Collective."""
        flag = torch.tensor([self._signal or 0], device=self.parallel.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def _relative(model: str) -> str:
    """Shorten the path of a folder below the working directory."""
    path = Path(model)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else model
