"""The Triton kernels: in Triton's interpreter against the torch code and the fp64 oracle, and through Triton's compiler
as far as a machine without a GPU takes them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ranks, checks_in

triton = pytest.importorskip("triton", reason="Triton is not installed here; the test extra brings it")

from eaopd_megatron.objective import triton_kernels as kernels  # noqa: E402
from eaopd_megatron.objective import triton_launch as launch  # noqa: E402

CHECKS = [Path(__file__).with_name(f"checks_kernel_{part}.py") for part in ("sums", "gradient")]
FILES = {check: file for file in CHECKS for check in checks_in(file)}
BY_DTYPE = {"check_sums": ("fp32", "bf16", "fp16"), "check_variants": ("fp32", "bf16")}
BY_DTYPE["check_the_gradient_over_the_logits"] = ("fp32", "bf16")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Ranks]:
    with Ranks(1, environment={"TRITON_INTERPRET": "1"}) as started:
        yield started


@pytest.mark.parametrize("check", [name for name in FILES if name not in BY_DTYPE])
def test_in_the_interpreter(interpreter: Ranks, check: str) -> None:
    interpreter.run(FILES[check], check)


@pytest.mark.parametrize(("check", "dtype"), [(name, dtype) for name, dtypes in BY_DTYPE.items() for dtype in dtypes])
def test_in_the_interpreter_by_precision(interpreter: Ranks, check: str, dtype: str) -> None:
    interpreter.run(FILES[check], check, dtype=dtype)


TYPES = {"excluded": "*i32", "rows": "*i64", "tokens": "*i32", "top_k_columns": "*i32"}
ALIGNED = ("student_stride", "teacher_stride", "out_stride", "num_valid")


def compiled(kernel: Any, flags: dict[str, bool], blocks: launch.BlockConfig, capability: int) -> dict[str, Any]:
    """All stages of a kernel for bf16 logits on a GPU of that capability, strides and widths multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**flags, "DEPTH": blocks.depth, "LANES": blocks.lanes, "STAGES": blocks.stages}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("student", "teacher", "out"):
            signature[name] = "*bf16"
        else:
            number = name.endswith("stride") or name in ("n", "num_valid")
            signature[name] = "i32" if number else TYPES.get(name, "*fp32")
        if signature[name].startswith("*") or name in ALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": blocks.warps}).asm


SUMS_FLAGS = ("HAS_TEACHER", "HAS_TAIL", "HAS_NEG_INF")
GRADIENT_FLAGS = ("HAS_ROWS", "HAS_REVERSE", "HAS_FORWARD", "HAS_TOKEN", "HAS_TOP_K", "HAS_TOP_K_KAPPA", "HAS_NEG_INF")


@pytest.mark.parametrize(
    ("kernel", "flags", "capability"),
    [
        ("sums", "", 80),
        ("sums", "HAS_TEACHER", 90),
        ("sums", "HAS_TEACHER HAS_TAIL HAS_NEG_INF", 90),
        ("gradient", "HAS_REVERSE HAS_FORWARD", 90),
        ("gradient", "HAS_ROWS HAS_FORWARD HAS_TOKEN", 90),
        ("gradient", "HAS_TOKEN HAS_TOP_K", 80),
        ("gradient", " ".join(GRADIENT_FLAGS), 90),
    ],
)
def test_compiles_to_wide_loads_and_no_spills(
    kernel: str, flags: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes programs that the compiler refuses, and does not see what makes a kernel slow: logits that
    are read one by one, or numbers of a lane that do not fit the registers."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    program, names, candidates = {
        "sums": (kernels.sums_kernel, SUMS_FLAGS, launch.SUMS_CONFIGS),
        "gradient": (kernels.gradient_kernel, GRADIENT_FLAGS, launch.GRADIENT_CONFIGS),
    }[kernel]
    assert set(flags.split()) <= set(names)
    asm = compiled(program, {name: name in flags.split() for name in names}, candidates[0], capability)
    assert not re.search(r"ld\.global\S*\.b16|st\.global\S*\.b16", asm["ptx"])
    assert re.search(r"cp\.async\.cg\S* .*, 0x10|ld\.global\S*\.v4\.b32", asm["ptx"])
    (tmp_path / "kernel.cubin").write_bytes(asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
    assert re.search(r"arith\.extsi %\S+ : i32 to i64", asm["ttir"]), "rows have 32-bit offsets"


def test_block_sizes_are_chosen_once_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = launch.SUMS_CONFIGS
    tried: list[launch.BlockConfig] = []

    def time(attempt: Any, blocks: launch.BlockConfig, rows: int) -> float:
        tried.append(blocks)
        return 1.0 if blocks == candidates[3] else float("inf") if blocks == candidates[0] else 2.0

    monkeypatch.setattr(launch, "measure_ms", time)
    monkeypatch.setattr(launch, "_best", {})

    def choose(kind: str, rows: int) -> launch.BlockConfig:
        return launch.autotuned_config(candidates, (kind,), 1000, rows, lambda blocks, count: None)

    assert choose("a", launch.MIN_AUTOTUNE_ROWS - 1) == candidates[0] and not tried
    assert choose("a", 1000) == candidates[3] and tried == list(candidates)
    assert choose("a", 1001) == candidates[3] and tried == list(candidates)
    choose("b", 1000)
    assert len(tried) == 2 * len(candidates)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose("c", 1000) == candidates[0] and len(tried) == 2 * len(candidates)
