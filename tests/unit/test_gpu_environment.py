"""Variables and the GPU of a rank. There is no GPU here: `nvidia-smi` and the number of devices are stand-ins."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eaopd_megatron import worker
from eaopd_megatron.config import load_recipe
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings
from eaopd_megatron.utils import gpu_environment as gpu
from tests.ranks import ROOT

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
ALONE, TENSOR, CONTEXT = ParallelLayout(), ParallelLayout(tensor_parallel=2), ParallelLayout(context_parallel=2)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has set nothing, in an environment without these variables."""
    monkeypatch.setattr(gpu, "_own", set())
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not re.search("NCCL|TF32|MAX_CONN", k)})
    yield


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *capabilities: str) -> None:
    """A machine whose driver lists GPUs of these compute capabilities; without any there is no driver."""
    lines = "".join(f"echo {one}\n" for one in capabilities)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}" if lines else "#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setitem(os.environ, "PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("capabilities", "layout", "expected"),
    [
        (("9.0", "9.0"), TENSOR, "1"),
        (("8.0",), CONTEXT, "1"),
        (("9.0",), ALONE, None),
        (("10.0", "10.0"), TENSOR, None),
        (("12.0",), CONTEXT, None),
        ((), TENSOR, None),
    ],
)
def test_launches_lose_their_order_before_blackwell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capabilities: tuple[str], layout: ParallelLayout, expected: str
) -> None:
    machine(monkeypatch, tmp_path, *capabilities)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was initialised"))
    gpu.prepare_rank(layout)
    assert os.environ.get(CONNECTIONS) == expected


def test_what_the_user_set_is_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, "9.0")
    given = {CONNECTIONS: "8", "NCCL_CUMEM_ENABLE": "1", "TORCH_NCCL_ENABLE_MONITORING": "1"}
    os.environ.update(given)
    gpu.prepare_rank(TENSOR, update_groups=True)
    assert given.items() <= os.environ.items()
    assert gpu.own_variables() == {"NCCL_NVLS_ENABLE"}
    assert gpu.update_group_environment() == {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}


def test_a_run_without_servers_loses_what_nccl_does_by_itself() -> None:
    gpu.prepare_rank(ALONE)
    assert not gpu.own_variables()


@pytest.mark.parametrize(("precision", "expected"), [("fp32", {"NVIDIA_TF32_OVERRIDE"}), ("bf16", set())])
def test_fp32_is_tf32_with_transformer_engine(precision: str, expected: set[str]) -> None:
    recipe = load_recipe(str(ROOT / "recipes/countdown/eopd.yaml"), [f"student.precision={precision}"])
    worker._prepare_student_rank(recipe)
    assert gpu.own_variables() == expected


def test_trainer_and_server_start_nccl_differently(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether the trainer started the server or a Slurm step of its own did, which has no rank's variables."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    server = SGLangServer(SGLangSettings(tmp_path, 64), tmp_path / "log")
    in_a_step = dict(server.environment())
    gpu.prepare_rank(ALONE, update_groups=True)
    ours = {name: os.environ[name] for name in gpu.UPDATE_GROUP_VARIABLES}
    assert in_a_step == dict(server.environment()) == ours == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
    os.environ["NCCL_CUMEM_ENABLE"] = "1"  # the user's
    assert server.environment()["NCCL_CUMEM_ENABLE"] == "1"


def test_a_server_takes_over_what_its_trainer_set_for_itself(tmp_path: Path) -> None:
    """A teacher would dump its collectives over those of the trainer, and launch its kernels as the student does."""
    code = f"""
        import os, sys, time
        from pathlib import Path
        from eaopd_megatron.distributed.heartbeat import enable_flight_recorder
        from eaopd_megatron.serving.process import ServerProcess
        from eaopd_megatron.utils.gpu_environment import set_unless_given
        class Shown(ServerProcess):
            def command(self): return [sys.executable, "-c", "import os; print(sorted(os.environ))"]
            def key_arguments(self, file): return []
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
        enable_flight_recorder(Path("{tmp_path}"), 10)
        set_unless_given({{"CUDA_DEVICE_MAX_CONNECTIONS": "1"}})
        shown = Shown(Path("{tmp_path}/log"))
        shown.start()
        shown._exit_thread.join(); shown._log_thread.join()
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    subprocess.run([sys.executable, "-c", lines], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    seen = (tmp_path / "log").read_text()
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" in seen, "the user's"
    assert "TORCH_FR_" not in seen and CONNECTIONS not in seen


@pytest.mark.parametrize(("visible", "local", "index"), [(8, "5", 5), (1, "0", 0), (1, "5", 0), (4, None, 0)])
def test_a_site_shows_each_task_one_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: int, local: str | None, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert gpu.local_device_index({} if local is None else {"LOCAL_RANK": local}) == index


def test_a_rank_without_a_gpu_is_a_traceback_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 5, and this rank sees 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1\)"):
        gpu.local_device_index({"LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "0,1"})


def test_a_device_is_chosen_elsewhere() -> None:
    """`local_device_index` is the one place that knows how a rank comes to its GPU."""
    for file in (ROOT / "eaopd_megatron").rglob("*.py"):
        for line in file.read_text().splitlines():
            assert "set_device(" not in line or "local_device_index()" in line or "device)" in line, (file, line)
            if file.name != "gpu_environment.py":
                assert 'int(os.environ["LOCAL_RANK"])' not in line and 'environ.get("LOCAL_RANK"' not in line, file


@pytest.mark.parametrize("tool", ["mcore_to_hf.py --checkpoint", "hf_to_mcore.py --hf"])
def test_a_conversion_is_verified_in_tf32(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's products of fp32 matrices are TF32, a thousand times coarser than the limit."""
    name, option = tool.split()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    module = importlib.import_module(f"tools.{name.removesuffix('.py')}")
    assert module.main([option, str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 1
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_a_server_with_other_options_shares_a_group() -> None:
    url = "http://a:1"
    assert gpu.nccl_difference(url, {"enable_symm_mem": False, "enable_nccl_nvls": False}) is None
    assert gpu.nccl_difference(url, {}) is None
    line = gpu.nccl_difference(url, {"enable_nccl_nvls": True})
    assert line is not None and line.startswith("http://a:1 runs NCCL with NCCL_NVLS_ENABLE=1 (its options")
    assert "export NCCL_NVLS_ENABLE=1 for the trainer" in line
    os.environ.update(NCCL_CUMEM_ENABLE="1", NCCL_NVLS_ENABLE="1")
    assert gpu.nccl_difference(url, {"enable_symm_mem": True}) is None
