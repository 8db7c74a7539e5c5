"""Tests of the scripts that run a tool on one node."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, Site

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
# Runs what stands behind the image, and tells what stood before it.
APPTAINER = """#!/bin/bash
[[ $1 == exec ]] || exit 9
while [[ $1 != *.sif ]]; do
    echo "apptainer: $1"
    shift
done
shift
exec "$@"
"""


def test_a_container_hides_the_checkout_or_the_model(site: Site, tmp_path: Path) -> None:
    """`apptainer` is a stand-in that records the options from evaluate.sh and runs the command in this environment."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apptainer").write_text(APPTAINER)
    (tools / "apptainer").chmod(0o755)
    (tmp_path / "image.sif").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "cache").mkdir()
    student = ROOT / "recipes/countdown/student"
    small = ("--samples", "1", "--problems", "4", "--max-response-tokens", "8", "--out", str(tmp_path / "evaluation"))
    job = site.submit(
        *("evaluate.sh", str(student), "--benchmarks", "countdown", *small),
        changes={
            "EAOPD_CONTAINER": "apptainer",
            "EAOPD_IMAGE": str(tmp_path / "image.sif"),
            "EAOPD_MODELS": str(tmp_path / "models"),
            "HF_HOME": str(tmp_path / "cache"),
            "PATH": f"{tools}:$PATH",
        },
    )
    assert job.finish() == "COMPLETED 0:0", job.output
    binds = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},{tmp_path}/models:{tmp_path}/models,{tmp_path}/cache:{tmp_path}/cache"
    assert (
        f"apptainer: --nv\napptainer: --bind\napptainer: {binds}\napptainer: --pwd\napptainer: {ROOT}\n" in job.output
    )
    assert "| countdown | 4 × 1 |" in job.output


def test_a_conversion_does_not_end(site: Site, tmp_path: Path) -> None:
    """The arguments select the tool, and the tool's error is the job's."""
    there = tmp_path / "there"
    forth = site.submit("convert.sh", "--hf", str(ROOT / "recipes/countdown/student"), "--out", str(there))
    back = site.submit("convert.sh", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "back"))
    assert forth.finish() == "COMPLETED 0:0", forth.output
    assert (there / "hf/config.json").exists()
    assert back.finish() == "FAILED 1:0", back.output
    assert f"error: --checkpoint: there is no folder {tmp_path}/none" in back.output


def test_an_evaluation_near_its_time_limit_is_lost(site: Site, tmp_path: Path) -> None:
    """A signal stops the evaluation, the job is requeued, and it resumes with the existing responses."""
    student, out = ROOT / "recipes/countdown/student", tmp_path / "evaluation"
    arguments = ("--benchmarks", "countdown", "--samples", "8", "--batch-size", "32", "--max-response-tokens", "16")
    job = site.submit("evaluate.sh", str(student), *arguments, "--out", str(out))
    job.wait_for(r"countdown: (\d+) of 4576 responses")
    site.cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.wait_for("stopped; what is done is kept, back into the queue")
    before = job.output
    job.release()
    assert job.finish() == "COMPLETED 0:0", job.output
    assert "| countdown | 572 × 8 |" in job.output
    assert "of 4576 responses are to be generated" in job.output.removeprefix(before)


TASKS = """#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
source slurm/lib/job.sh || exit
begin
(on 2 "${nodes[0]}" bash -c 'echo "task $SLURM_LOCALID sees $CUDA_VISIBLE_DEVICES"')
srun --overlap --ntasks=2 --gpus-per-node=8 bash -c 'echo "the site shows $CUDA_VISIBLE_DEVICES"'
"""


def test_a_site_binds_each_task_to_one_gpu(site: Site, tmp_path: Path) -> None:
    """Ranks and servers count the GPUs of their node: a step lets every task see all of them."""
    script = tmp_path / "tasks.sh"
    script.write_text(TASKS)
    job = site.submit(os.path.relpath(script, ROOT / "slurm"), options=["--export=ALL,SLURM_GPU_BIND=single:1"])
    assert job.finish() == "COMPLETED 0:0", job.output
    every = ",".join(map(str, range(8)))
    assert set(re.findall(r"task (\d) sees (\S+)", job.output)) == {("0", every), ("1", every)}
    assert set(re.findall(r"the site shows (\S+)", job.output)) != {every}, "the site binds nothing: nothing was tested"
