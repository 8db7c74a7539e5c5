"""A run's metrics: metrics.jsonl (one JSON object per iteration), TensorBoard events and Weights & Biases."""

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.utils.files import atomic_write

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_COUNTERS = ("iteration", "update")  # integers that identify a record; every other entry is a figure
_TENSORBOARD_FLUSH_SECONDS = 5


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl in order; [] without a file.

    An incomplete last line, which is being written or was left by a crash, is skipped. Raise UserError, with the line's
    number, for any other line that is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
                raise ValueError("no object with an iteration")
        except ValueError as error:
            if number == len(lines):  # the line has no end
                break
            raise UserError(f"{path} line {number} is not a metrics record ({error}): remove that line") from error
        records.append(record)
    return records


class MetricsWriter(contextlib.AbstractContextManager["MetricsWriter"]):
    """Appends records to folder/metrics.jsonl and passes them to TensorBoard and Weights & Biases. Rank 0 owns it.

    resume_iteration: iteration of the checkpoint that the run resumes from; later records are removed first, because
    the run repeats them. None: a new run; all records are removed. wandb: None, or {"project", "name" (or None),
    "config" (the resolved recipe)}. `dropped` counts per figure how often it was NaN or infinite and hence not
    recorded.

    Raise UserError if tensorboard or wandb is enabled and missing.
    """

    def __init__(
        self, folder: Path, tensorboard: bool, wandb: dict[str, Any] | None, resume_iteration: int | None
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self._sinks: list[_TensorBoard | _Wandb] = []
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", resume_iteration))
        if wandb is not None:
            self._sinks.append(_Wandb(folder, wandb, resume_iteration))
        _truncate_after(path, resume_iteration)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append {"iteration": int, "update": int, "<name>": number, ...}; on return the line is in the file.

        Numbers may be Python's, numpy's or one-element tensors. NaN and infinite figures are left out.
        """
        clean: dict[str, float] = {name: int(record[name]) for name in _COUNTERS if name in record}
        for name, value in record.items():
            if name in _COUNTERS:
                continue
            clean[name] = float(value)
            if not math.isfinite(clean[name]):
                self.dropped[name] += 1
                number, times = clean.pop(name), self.dropped[name]
                if times & (times - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time, so that the log stays readable
                    message = "%s is %s at iteration %d and is left out (time %d)"
                    logger.warning(message, name, number, record["iteration"], times)
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(clean)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _truncate_after(path: Path, iteration: int | None) -> None:
    """Atomically rewrite the file with the complete records up to `iteration` (None: with none)."""
    if not path.exists():
        return
    records = [] if iteration is None else [r for r in read_metrics(path) if r["iteration"] <= iteration]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))


def import_sink(module: str, package: str) -> Any:
    """Import what `reporting.<package>` needs. Raises UserError if it is missing or cannot be imported."""
    off = f"or set reporting.{package}=false"
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ImportError) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"reporting.{package}: the package {package} is missing; pip install {package}, {off}"
            ) from error
        raise UserError(
            f"reporting.{package}: the package {package} is installed and cannot be imported "
            f"({type(error).__name__}: {one_line(error)}); mend its installation, {off}"
        ) from error


class _TensorBoard:
    def __init__(self, folder: Path, resume_iteration: int | None) -> None:
        SummaryWriter = import_sink("torch.utils.tensorboard", "tensorboard").SummaryWriter
        first = 0 if resume_iteration is None else resume_iteration + 1
        self._writer = SummaryWriter(  # type: ignore[no-untyped-call]
            log_dir=str(folder), purge_step=first, flush_secs=_TENSORBOARD_FLUSH_SECONDS
        )

    def write(self, record: Mapping[str, float]) -> None:
        step = int(record["iteration"])
        for name, value in record.items():
            if name not in _COUNTERS:
                self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class _Wandb:
    """Stores its id in the run's folder, so that a resumed run continues the same curves."""

    def __init__(self, folder: Path, options: dict[str, Any], resume_iteration: int | None) -> None:
        wandb = import_sink("wandb", "wandb")
        id_file = folder / "wandb_id.txt"
        if resume_iteration is None or not id_file.exists():
            atomic_write(id_file, secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=options.get("project"),
            name=options.get("name"),
            config=options.get("config"),
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
        )
        # wandb's own step cannot decrease, but a resumed run repeats iterations: the x axis is the iteration instead
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record))

    def close(self) -> None:
        self._run.finish()
