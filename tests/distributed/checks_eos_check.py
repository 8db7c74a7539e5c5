"""Checks of `eaopd doctor RECIPE` on ranks: the end tokens of a pair, at several layouts and signals."""

from __future__ import annotations

import math
from pathlib import Path

import torch.distributed as dist

from eaopd_megatron.config import load_recipe
from eaopd_megatron.data.countdown import EOS_ID
from eaopd_megatron.diagnostics.eos_check_rank import PROMPTS, eos_check_results
from eaopd_megatron.training.components import build_components
from eaopd_megatron.training.run_folder import RunFolder
from tests.distributed.groups import model_parallel

WIDE = ("student.tensor_parallel=2", "student.sequence_parallel=true", "student.context_parallel=2")
DEEP = ("student.tensor_parallel=1", "student.pipeline_parallel=2")
CASES = (
    (WIDE, "swap", "eopd"),
    (WIDE, "none", "eopd"),
    (WIDE, "swap", "eopd_exact"),
    (DEEP, "label", "eopd"),
    (DEEP, "swap", "eopd_exact"),
)


def check_a_teacher_of_several_has_no_prompt(group: dist.ProcessGroup, recipe: str, folder: str) -> None:
    """Each teacher is checked on the prompts that name it; one without prompts reports nothing."""
    changes = ["teachers.math.signal=topk", "teachers.code.signal=topk", "teachers.none.signal=topk"]
    loaded = load_recipe(recipe, [*DEEP, *changes, "evaluation.benchmarks=[]", f"run.folder={folder}"])
    with model_parallel(loaded.student.parallel_layout) as parallel:
        parts = build_components(loaded, parallel, RunFolder(Path(folder)), stop_signal=lambda: 0, log=print)
        results = {one.name: one for one in eos_check_results(loaded, parts, parallel)}
    assert list(results) == ["math", "code", "none"]
    assert [one.prompts for one in results.values()] == [PROMPTS, PROMPTS, 0]
    assert not results["none"].ends and not results["none"].disagrees
    assert all(len(results[name].ends) > PROMPTS // 2 and not results[name].disagrees for name in ("math", "code"))


def check_another_end_goes_unnoticed(group: dist.ProcessGroup, recipe: str, teacher: str, folder: str) -> None:
    """The teacher ends with another id: under either map the student's stop is as likely as its own, else not."""
    all_mapped: list[list[float]] = []
    for layout, kind, preset in CASES:
        changes = [f"teacher.model={teacher}", f"teacher.terminal_map={kind}", f"objective.preset={preset}"]
        loaded = load_recipe(recipe, [*layout, *changes, "evaluation.benchmarks=[]", f"run.folder={folder}"])
        with model_parallel(loaded.student.parallel_layout) as parallel:
            parts = build_components(loaded, parallel, RunFolder(Path(folder)), stop_signal=lambda: 0, log=print)
            (result,) = eos_check_results(loaded, parts, parallel)
        assert result.prompts == PROMPTS and len(result.ends) > PROMPTS // 2
        assert {token for token, _, _ in result.ends} == {EOS_ID}
        assert result.disagrees is (kind == "none"), result
        mapped, plain = (sorted(values) for values in list(zip(*result.ends, strict=True))[1:])
        if preset == "eopd_exact":
            assert sum(plain) / len(plain) < -10
        elif kind == "swap":
            assert all(math.isnan(value) for value in plain)
        if kind != "none":
            all_mapped.append(mapped)
    assert all(abs(a - b) < 1e-4 for one in all_mapped for a, b in zip(one, all_mapped[0], strict=True))
    assert not list(Path(folder).iterdir())
