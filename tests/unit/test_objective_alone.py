"""The objective must stay usable by other trainers: it imports torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import torch
before = set(sys.modules)
from eaopd_megatron.objective import *
import eaopd_megatron.objective.dense_reference
ours = {name for name in sys.modules if name.split(".")[0] == "eaopd_megatron"}
allowed = {"eaopd_megatron", "eaopd_megatron.objective"}
assert all(name in allowed or name.startswith("eaopd_megatron.objective.") for name in ours), ours
foreign = ("megatron", "transformers", "pydantic", "omegaconf", "datasets", "numpy.testing", "triton", "safetensors")
assert not [name for name in set(sys.modules) - before if name.split(".")[0] in foreign]
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - {"eaopd_megatron", "torch"}
assert loaded <= set(sys.stdlib_module_names), loaded - set(sys.stdlib_module_names)
"""


def test_the_objective_imports_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_settings_of_the_objective_import_no_torch() -> None:
    program = "import sys; import eaopd_megatron.objective.settings; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
