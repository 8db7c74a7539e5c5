"""tools/lib/environment.sh installs once, resumes after an interruption, and reports errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f'set -euo pipefail; source "{ROOT}/tools/lib/environment.sh"; prepare_environment "$1"; echo "ready $python"'
EDITABLE = f"install --constraint {ROOT}/tools/lib/versions.txt --editable {ROOT}"

# A Python whose pip only records its arguments, and fails if they contain the word in the file `fail`.
FAKE = f"""#!/bin/sh
here=$(dirname "$0")
if [ "$1 $2" = "-m pip" ]; then
    echo "$*" >> "$here/pip_calls"
    case "$*" in *"$(cat "$here/fail" 2>/dev/null || echo nothing)"*) echo "no network"; exit 1;; esac
    exit 0
fi
exec {sys.executable} "$@"
"""

Prepare = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(FAKE)
    python.chmod(0o755)

    def prepare(kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", SCRIPT, "bash", kind],
            env={**os.environ, "EAOPD_VENV": str(tmp_path / "venv"), **environment},
            capture_output=True,
            text=True,
        )

    return prepare


def pip_calls(folder: Path) -> list[str]:
    """Return pip's arguments since the last call."""
    file = folder / "venv" / "bin" / "pip_calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.removeprefix("-m pip ") for line in lines]


def test_a_second_run_installs_nothing(prepare: Prepare, tmp_path: Path) -> None:
    done = prepare("test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"ready {tmp_path}/venv/bin/python"
    assert pip_calls(tmp_path) == ["install torch==2.13.0", f"{EDITABLE}[test]"]
    for kind in ("test", "run"):
        assert prepare(kind).stdout == f"ready {tmp_path}/venv/bin/python\n"
        assert pip_calls(tmp_path) == []


def test_the_tests_install_their_packages_after_the_quickstart(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare("run").returncode == 0
    assert pip_calls(tmp_path)[-1] == EDITABLE
    assert prepare("test").returncode == 0
    assert pip_calls(tmp_path)[-1] == f"{EDITABLE}[test]"
    assert prepare("run").returncode == 0
    assert pip_calls(tmp_path) == []


@pytest.mark.parametrize("word", ["torch==", "--editable"])
def test_an_interrupted_installation_is_resumed(prepare: Prepare, tmp_path: Path, word: str) -> None:
    (tmp_path / "venv" / "bin" / "fail").write_text(word)
    done = prepare("run")
    assert done.returncode == 1
    assert "no network" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: installing ")
    pip_calls(tmp_path)
    (tmp_path / "venv" / "bin" / "fail").unlink()
    assert prepare("run").returncode == 0
    assert len(pip_calls(tmp_path)) == 2


def test_a_wrong_python_is_reported_in_one_line(prepare: Prepare, tmp_path: Path) -> None:
    elsewhere = {"EAOPD_VENV": str(tmp_path / "new")}
    done = prepare("run", EAOPD_PYTHON="no-such-python", **elsewhere)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: EAOPD_PYTHON is 'no-such-python', which is not a Python of version 3.11 or later\n"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    done = prepare("run", EAOPD_VENV=str(full))
    assert done.stderr.startswith(f"error: {full} exists and is not a Python environment")
    assert (full / "file").exists()
