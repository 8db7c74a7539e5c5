"""The doctor: each harmful state is found and comes with its remedy, and a broken import is a line, not a traceback."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
from packaging.requirements import Requirement

from eaopd_megatron.config import load_recipe
from eaopd_megatron.diagnostics import machine as doctor
from eaopd_megatron.diagnostics.machine import Finding, MachineFacts, check_servers, judge_facts
from eaopd_megatron.utils.gpu_environment import UPDATE_GROUP_VARIABLES
from tools.sglang_double.processes import in_a_loop
from tools.sglang_double.server import Double

WELL = MachineFacts(
    python=(3, 11, 7),
    packages={
        "torch": "2.13.0+cpu",
        "megatron-core": "0.16.1",
        "psutil": "7.2.2",
        "transformer-engine": None,
        "sglang": None,
    },
    requirements=("torch==2.13.0", "megatron-core==0.16.1", "psutil>=7.2"),
    probe={"torch": "2.13.0+cpu", "cuda_build": None, "gpus": [], "backends": ["gloo"], "megatron": "0.16.1"},
    cpus=2,
    memory=24 * 2**30,
    driver_gpus=(),
    disk_free=50 * 2**30,
    folder="here",
)
GPU = replace(
    WELL,
    packages={**WELL.packages, "torch": "2.13.0", "transformer-engine": "2.11"},
    probe={**WELL.probe, "cuda_build": "13.0", "gpus": ["H100", "H100"], "backends": ["gloo", "nccl"]},
    driver_gpus=("GPU 0: H100", "GPU 1: H100"),
)


def problems(facts: MachineFacts) -> list[Finding]:
    return [finding for finding in judge_facts(facts) if finding.level == "problem"]


def changed(facts: MachineFacts, part: str, **values: Any) -> MachineFacts:
    changes: dict[str, Any] = {part: {**getattr(facts, part), **values}}
    return replace(facts, **changes)


@pytest.mark.parametrize("facts", [WELL, GPU], ids=["cpu", "gpu"])
def test_a_sound_machine_is_called_ill(facts: MachineFacts) -> None:
    assert problems(facts) == []


@pytest.mark.parametrize(
    ("facts", "subject", "seen", "remedy"),
    [
        (replace(WELL, python=(3, 10, 4)), "python", "3.10.4", "Python 3.11"),
        (changed(WELL, "packages", torch="2.12.1"), "torch", "2.12.1, but torch==2.13.0 is needed", '"torch==2.13.0"'),
        (changed(WELL, "packages", psutil=None), "psutil", "checkpoints hang", "pip install"),
        (
            changed(WELL, "packages", **{"transformer-engine": "2.20"}),
            "transformer-engine",
            "2.20 on a machine without a GPU",
            "pip uninstall transformer-engine",
        ),
        (replace(WELL, driver_gpus=("GPU 0: H100",)), "devices", "torch is a CPU build", "CUDA build"),
        (
            changed(GPU, "probe", gpus=[]),
            "devices",
            "2 GPUs by nvidia-smi, but torch sees none",
            "CUDA_VISIBLE_DEVICES",
        ),
        (changed(GPU, "probe", backends=["gloo"]), "backends", "nccl missing", "official wheels"),
        (changed(WELL, "probe", backends=[]), "backends", "gloo missing", "official wheels"),
        (replace(WELL, disk_free=2**30), "disk", "1.0 GiB free", "run.folder"),
    ],
)
def test_a_harmful_state_is_not_found(facts: MachineFacts, subject: str, seen: str, remedy: str) -> None:
    found = problems(facts)
    assert [finding.subject for finding in found] == [subject]
    assert seen in found[0].detail
    assert remedy in found[0].remedy


def test_a_transformer_engine_that_breaks_the_import_is_not_blamed() -> None:
    probe = {**WELL.probe, "megatron_error": "RuntimeError: Found empty `transformer-engine` meta package"}
    del probe["megatron"]
    ill = replace(changed(WELL, "packages", **{"transformer-engine": "2.20"}), probe=probe)
    found = {finding.subject: finding for finding in problems(ill)}
    assert set(found) == {"transformer-engine", "import megatron.core"}
    assert "pip uninstall transformer-engine" in found["import megatron.core"].remedy


def test_a_broken_torch_ends_in_a_traceback() -> None:
    ill = replace(WELL, probe={"torch_error": "OSError: libtorch.so: cannot open", "megatron_error": "OSError: ..."})
    assert [finding.subject for finding in problems(ill)] == ["devices", "import torch"]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('noise'); raise RuntimeError('bad')", "exit code 1: RuntimeError: bad"),
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
        ("import time; time.sleep(100)", "did not end in"),
    ],
)
def test_an_import_that_dies_takes_the_doctor_with_it(monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 2)
    facts = doctor._probe([sys.executable, "-c", program])
    assert said in facts["probe_error"]
    found = problems(replace(WELL, probe=facts))
    assert said in found[-1].detail


def test_this_environment_is_ill(capsys: pytest.CaptureFixture[str]) -> None:
    facts = doctor.gather_facts()
    assert {Requirement(text).name for text in facts.requirements} >= {"torch", "megatron-core", "psutil", "triton"}
    ill = [finding for finding in problems(facts) if finding.subject not in ("disk", "devices")]
    assert ill == []
    assert facts.probe["megatron"] == metadata.version("megatron-core")


def test_a_package_of_another_platform_or_an_extra_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2", "triton>=3; sys_platform == 'linux'", "winloop; os_name == 'nt'", "x; extra == 'gpu'"]
    monkeypatch.setattr(sys, "platform", "linux")
    assert doctor._for_this_platform(declared) == tuple(declared[:2])


@pytest.mark.parametrize(
    ("facts", "code", "last"), [(WELL, 0, "nothing is missing or harmful"), (None, 1, "1 to mend")]
)
@pytest.mark.parametrize("terminal", [False, True])
def test_exit_code_or_remedy_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    facts: MachineFacts | None,
    code: int,
    last: str,
    terminal: bool,
) -> None:
    monkeypatch.setattr(doctor, "gather_facts", lambda: facts or changed(WELL, "packages", psutil=None))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert doctor.check_machine() == code
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == last
    assert "gloo" in shown
    assert ("pip install" in shown) == bool(code)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"enable_symm_mem": True}, 1, "export NCCL_CUMEM_ENABLE=1 NCCL_NVLS_ENABLE=1 for the trainer"),
        ({"enable_symm_mem": False}, 0, "where NCCL_CUMEM_ENABLE=0 NCCL_NVLS_ENABLE=0 must hold as here"),
        ({"device": "cpu"}, 0, "nothing is missing or harmful"),
    ],
)
def test_a_users_own_server_runs_nccl_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: dict[str, object], code: int, said: str
) -> None:
    """/server_info tells the server's options, and nothing of its environment."""
    for name in UPDATE_GROUP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with in_a_loop() as run:
        double = run(Double().__aenter__())
        info = double._server_info()
        double._server_info = lambda: info | more  # type: ignore[method-assign]
        recipe = load_recipe("recipes/countdown/eopd.yaml", ["rollout.engine=sglang", f"servers.urls=[{double.url}]"])
        assert check_servers(recipe) == code
        run(double.__aexit__())
    assert said in capsys.readouterr().out


def test_a_server_that_does_not_run_is_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9"
    assert check_servers(load_recipe("recipes/countdown/eopd.yaml", ["rollout.engine=sglang", f"servers.urls=[{url}]"]))
    assert "start it, or correct servers.urls" in capsys.readouterr().out
    assert check_servers(load_recipe("recipes/countdown/eopd.yaml", [])) == 0
