"""A recipe is read without torch, transformers, pandas or datasets: each of them takes longer than all the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "pandas", "datasets", "megatron")
COMMAND = """\
from eaopd_megatron.cli import main
try: main({arguments!r})
except SystemExit as stopped: assert not stopped.code, stopped.code
"""
LAUNCHER = """\
from eaopd_megatron.config import load_recipe
from eaopd_megatron.launch import local_ranks
from eaopd_megatron.training.run_folder import finished_message
assert finished_message(load_recipe("recipes/countdown/eopd.yaml", ["run.folder=runs/does-not-exist"])) is None
"""


def imported(program: str) -> list[str]:
    """The heavy modules that a program has imported."""
    report = f"\nimport sys; print('imported:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "command",
    [
        "show recipes/countdown/eopd.yaml",
        "show recipes/countdown/eopd.yaml --explain rollout",
        "plan recipes/countdown/eopd.yaml",
        "report --help",
        "doctor --help",
        "train --help",
    ],
)
def test_a_command_imports_torch(command: str) -> None:
    assert imported(COMMAND.format(arguments=command.split())) == []


def test_the_launcher_imports_torch_to_read_a_recipe() -> None:
    assert imported(LAUNCHER) == []
