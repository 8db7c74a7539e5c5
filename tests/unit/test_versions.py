"""The versions that environments install are those that pyproject.toml allows; a lock installs Transformer Engine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eaopd_megatron.utils.environment import package_versions

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "slurm/container"
LOCKS = {
    "requirements-x86_64.lock": ("3.12", "x86_64"),
    "requirements-aarch64.lock": ("3.12", "aarch64"),
    "requirements-py311.lock": ("3.11", "x86_64"),
}


def pins(file: Path) -> dict[str, str]:
    """Return the version of each line NAME==VERSION."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


def allowed(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_a_run_records_the_version_of_a_package_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "megatron_core-99.0.dist-info").mkdir()
    (tmp_path / "megatron_core-99.0.dist-info/METADATA").write_text("Name: megatron-core\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_versions()["megatron-core"] == metadata.version("megatron-core") == "99.0"
    assert package_versions()["torch"] == metadata.version("torch")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_lacks_a_dependency_or_has_a_version_that_is_not_allowed(lock: str) -> None:
    locked = pins(CONTAINER / lock)
    for requirement in allowed("gpu", "sglang"):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
    assert {f"transformer-engine{part}" for part in ("", "-cu13", "-torch")} <= set(locked)
    assert len({version for name, version in locked.items() if name.startswith("transformer-engine")}) == 1
    assert "transformer-engine-cu12" not in locked


def test_two_machines_of_a_cluster_have_different_versions() -> None:
    one, other = (pins(CONTAINER / f"requirements-{machine}.lock") for machine in ("x86_64", "aarch64"))
    assert {name for name in set(one) & set(other) if one[name] != other[name]} == set()
    assert set(one) ^ set(other) == {"av", "decord2", "torchcodec"}  # how SGLang reads videos
    named = pins(CONTAINER / "versions.txt")
    assert named.items() <= one.items()


def test_a_cpu_environment_has_versions_that_no_lock_has() -> None:
    tested = pins(ROOT / "tools/lib/versions.txt")
    for requirement in allowed("sglang"):
        if requirement.name in tested:
            assert requirement.specifier.contains(tested[requirement.name])
    # the servers have an environment of their own
    assert tested.pop("sglang") == pins(CONTAINER / "versions.txt")["sglang"]
    assert tested.items() <= pins(CONTAINER / "requirements-py311.lock").items()
    servers = (ROOT / "tools/sglang_cpu/requirements.txt").read_text()
    locked = pins(CONTAINER / "requirements-x86_64.lock")
    for name in ("transformers", "tokenizers", "openai", "compressed-tensors", "sentencepiece"):
        assert f"\n{name}=={locked[name]}\n" in servers


def test_a_file_names_the_machine_on_which_a_lock_was_made() -> None:
    for file in CONTAINER.iterdir():
        assert not re.search(r"https?://|--(extra-)?index|/work/|/home/|/root/\w", file.read_text()), file.name


# An environment's Python: records pip's calls and what the compiler would find, and has the version of $VERSION.
FAKE = f"""#!{sys.executable}
import os, pathlib, re, sys
here = pathlib.Path(__file__).parent
if sys.argv[1:3] == ["-m", "pip"]:
    words = [open(word).read() if word.startswith("/dev/fd/") else word for word in sys.argv[4:]]
    found = [name for folder in os.environ.get("CPATH", "").split(":") for name in sorted(os.listdir(folder or "."))]
    wheels = os.environ.get("NVTE_BUILD_USE_NVIDIA_WHEELS")
    with (here / "calls").open("a") as calls:
        print(repr((words, found if "--no-build-isolation" in words else [], wheels)), file=calls)
elif "purelib" in sys.argv[2]:
    print(here / "packages")
elif "machine" in sys.argv[2]:
    print("Python " + os.environ["VERSION"] + ",", {platform.machine()!r})
else:
    sys.exit("OLD_GLIBC" in os.environ)
"""


def install(folder: Path, lock: Path, version: str = "3.12", **environment: str) -> subprocess.CompletedProcess[str]:
    for package in ("nccl", "cudnn"):
        headers = folder / "packages/nvidia" / package / "include"
        headers.mkdir(parents=True, exist_ok=True)
        (headers / f"{package}.h").touch()
    python = folder / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    return subprocess.run(
        ["bash", CONTAINER / "install.sh", python, lock],
        env={**os.environ, "VERSION": version, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "lock"
    file.write_text(
        f"# Python 3.12, {platform.machine()}, glibc 2.34 or later, CUDA 13.\ntorch==1\ntransformer-engine-torch==2\n"
    )
    return file


def test_transformer_engine_is_built_without_the_headers_of_nccl_or_with_another_cudnn(
    tmp_path: Path, lock: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/site.h").touch()
    done = install(tmp_path, lock, CPATH=str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    calls = [eval(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [words[-1] for words, _, _ in calls] == [
        lock.read_text().replace("transformer-engine-torch==2\n", ""),
        "pybind11",
        "transformer-engine-torch==2",
    ]
    assert calls[2][1:] == (["cudnn.h", "nccl.h", "site.h"], "1")
    # what each process of the environment starts with
    line = (tmp_path / "packages/eaopd_cudnn.pth").read_text()
    show = f"{line}import os; print(os.environ['CUDNN_HOME'])"
    for home, wanted in ({}, f"{tmp_path}/packages/nvidia/cudnn"), ({"CUDNN_HOME": "mine"}, "mine"):
        clean = {name: value for name, value in os.environ.items() if name != "CUDNN_HOME"}
        started = subprocess.run([sys.executable, "-c", show], env={**clean, **home}, capture_output=True, text=True)
        assert started.stdout == f"{wanted}\n"


def test_a_lock_for_another_python_or_machine_is_begun(tmp_path: Path, lock: Path) -> None:
    for begun, says in (
        (install(tmp_path, lock, version="3.11"), f"{lock} is for Python 3.12, .*python is Python 3.11, "),
        (install(tmp_path, tmp_path / "absent"), "no lock for this machine: .*absent"),
        (install(tmp_path, lock, OLD_GLIBC="1"), "the lock's packages need glibc 2.34 or later"),
    ):
        assert begun.returncode == 1
        assert re.fullmatch(f"error: {says}.*\n", begun.stderr)
    assert not (tmp_path / "calls").exists()
    for name, (python, machine) in LOCKS.items():
        first = (CONTAINER / name).read_text().splitlines()[0]
        assert first.startswith(f"# Python {python}, {machine}, glibc 2.34 or later, CUDA 13.")
