"""Until the services of a job serve: who is awaited, how far they are, and that one of them will never come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from eaopd_megatron.errors import UserError

POLL_SECONDS = 0.5
REPORT_SECONDS = 15.0


def await_services(
    names: Sequence[str],
    folder: Path,
    logs: Path,
    *,
    key: str,
    minutes: float,
    report: Callable[[str], None],
    interval: float = REPORT_SECONDS,
) -> list[str]:
    """Their URLs, once all of them serve.

    folder: the job's, with NAME.url of each that was started, and NAME.lost of one that is not started again, which
    holds why. logs: folder of NAME.log. Raises UserError for a lost one, and after so many minutes.
    """
    started = reported = time.monotonic()
    served: dict[str, str] = {}
    while waiting := [name for name in names if name not in served]:
        for name in waiting:
            with suppress(FileNotFoundError):
                raise UserError((folder / f"{name}.lost").read_text().strip())
            if url := _serving(folder / f"{name}.url", key):
                served[name] = url
        now = time.monotonic()
        missing = [name for name in names if name not in served]
        if missing and now - started > 60 * minutes:
            raise UserError(f"{missing[0]} does not serve after {minutes:g} minutes: {_last_line(logs, missing[0])}")
        if missing and now - reported > interval:
            reported = now
            line = _last_line(logs, missing[0])
            report(f"{len(served)} of {len(names)} serve after {now - started:.0f} s; {missing[0]}: {line}")
        if missing:
            time.sleep(POLL_SECONDS)
    report(f"{', '.join(names)} serve{'s' * (len(names) == 1)} after {time.monotonic() - started:.0f} s")
    return [served[name] for name in names]


def _serving(url_file: Path, key: str) -> str | None:
    with suppress(FileNotFoundError, httpx.TransportError):
        url = url_file.read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        if url and httpx.get(f"{url}/ready", headers=headers, timeout=5.0, trust_env=False).status_code == 200:
            return url
    return None


def _last_line(logs: Path, name: str) -> str:
    with suppress(OSError):
        lines = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return said[-1][:160]
    return "it has written nothing yet"
