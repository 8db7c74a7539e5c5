"""Hugging Face folder ↔ Megatron-Core model at TP 1, 2, 4 and TP2 with sequence parallelism; the tools.

Four gloo ranks are launched once; each conversion tool runs as a subprocess of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eaopd_megatron.launch import local_ranks as launch
from tests import tiny_models
from tests.ranks import ROOT, Ranks

CHECKS = Path(__file__).with_name("checks_models.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen3 with tied embeddings in one file and untied in three; bf16: the untied one, for the tools."""
    from eaopd_megatron.data import countdown

    root = tmp_path_factory.mktemp("models")
    tiny_models.write("qwen3", root / "tied")
    model = tiny_models.write("qwen3_untied", root / "untied", max_shard_size="150kB")
    model.bfloat16().save_pretrained(root / "bf16")
    countdown.countdown_tokenizer().save_pretrained(root / "bf16")
    return {name: root / name for name in ("tied", "untied", "bf16")}


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True)])
def test_greedy_tokens_are_transformers(ranks: Ranks, folders: dict[str, Path], name: str, tp: int, sp: bool) -> None:
    ranks.run(CHECKS, "check_decoding", folder=str(folders[name]), tp=tp, sp=sp)


@pytest.mark.parametrize(("name", "shard_bytes"), [("tied", 10**9), ("untied", 150_000), ("bf16", 10**9)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_round_trip_changes_no_bit(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, name: str, shard_bytes: int, tp: int
) -> None:
    out = tmp_path / "out"
    ranks.run(
        CHECKS,
        "check_round_trip",
        folder=str(folders[name]),
        out=str(out),
        layout={"tensor_parallel": tp},
        shard_bytes=shard_bytes,
        files=3 if name == "untied" else 1,
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (folders[name] / file).read_bytes()
    if tp == 4 and name != "bf16":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        expected = load_file(folders[name] / "expected" / "values.safetensors")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == torch.float32
        assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
        assert AutoTokenizer.from_pretrained(out).get_vocab()


def test_an_export_takes_no_weight_before_its_gather_has_ended(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path
) -> None:
    ranks.run(CHECKS, "check_export_waits_for_gathers", folder=str(folders["tied"]), out=str(tmp_path / "out"))


def test_an_export_in_another_dtype_says_so_in_its_config(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path
) -> None:
    ranks.run(CHECKS, "check_export_in_another_dtype", folder=str(folders["tied"]), out=str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("tp", [1, 4])
def test_swapped_ids_exchange_their_logits_and_nothing_else(
    ranks: Ranks, folders: dict[str, Path], name: str, tp: int
) -> None:
    """A swap in the embedding too would leave a tied teacher's probability of the stop as low as it was."""
    ranks.run(CHECKS, "check_swapped_rows", folder=str(folders[name]), tp=tp)


def test_a_forgotten_parameter_is_an_error(ranks: Ranks, folders: dict[str, Path]) -> None:
    ranks.run(CHECKS, "check_every_parameter_is_filled", folder=str(folders["tied"]))


def test_a_full_disk_leaves_the_folder_as_it_was(ranks: Ranks, folders: dict[str, Path], tmp_path: Path) -> None:
    ranks.run(CHECKS, "check_full_disk", folder=str(folders["tied"]), out=str(tmp_path / "out"))


def test_an_import_on_a_full_disk_leaves_nothing(ranks: Ranks, folders: dict[str, Path], tmp_path: Path) -> None:
    ranks.run(CHECKS, "check_import_on_a_full_disk", folder=str(folders["tied"]), out=str(tmp_path / "out"))


def test_a_disk_without_room_is_refused_before_anything_is_written(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path
) -> None:
    ranks.run(CHECKS, "check_no_room", folder=str(folders["tied"]), out=str(tmp_path / "out"))


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a tool as a user does, without being told where the package is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def imported(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bf16 folder imported at TP 2."""
    out = tmp_path_factory.mktemp("import") / "mcore"
    done = tool("hf_to_mcore.py", "--hf", folders["bf16"], "--out", out, "--tensor-parallel", 2, "--verify")
    assert done.returncode == 0, done.stderr
    assert "verify: largest difference" in done.stdout
    assert done.stdout.endswith(f"wrote {out}\n")
    assert done.stderr == ""
    return out


def test_the_tools_give_the_folder_back_bit_for_bit(imported: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Written by two ranks, read by one: query groups or vocabulary rows out of order would show."""
    record = json.loads((imported / "import.json").read_text())
    assert record["layout"] == {"tensor_parallel": 2, "pipeline_parallel": 1, "expert_parallel": 1}
    assert (record["vocab_size"], record["padded_vocab_size"], record["dtype"]) == (300, 512, "bfloat16")
    out = tmp_path / "hf"
    done = tool("mcore_to_hf.py", "--checkpoint", imported, "--out", out, "--verify")
    assert done.returncode == 0, done.stderr
    assert "verify: largest difference" in done.stdout
    assert done.stderr == ""
    one, other = (load_file(folder / "model.safetensors") for folder in (folders["bf16"], out))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype for name, tensor in one.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def main_of(name: str) -> Callable[[Sequence[str]], int]:
    """A tool's main, to be called in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def error_line(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """What a tool says when it refuses: one line."""
    assert main_of(name)([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown


def test_a_runs_step_folder_is_exported_and_a_damaged_one_refused(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are read from between the optimiser's states, which the export does not need."""
    ranks.run(CHECKS, "check_step_folder", folder=str(folders["tied"]), out=str(tmp_path / "checkpoints"))
    step, out = tmp_path / "checkpoints" / "step_000007", tmp_path / "out"
    assert main_of("mcore_to_hf")(["--checkpoint", str(step), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    one, other = (load_file(folder / "model.safetensors") for folder in (folders["tied"], out))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    shard = step / "sharded" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "__1_0.distcp" in error_line(capsys, "mcore_to_hf", "--checkpoint", step, "--out", tmp_path / "again")


def test_a_damaged_import_is_named(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(imported, damaged)
    shard = damaged / "sharded" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    line = error_line(capsys, "mcore_to_hf", "--checkpoint", damaged, "--out", out)
    assert f"{damaged}/sharded" in line
    assert not out.exists()


def test_the_import_refuses_what_it_cannot_do(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(hf: object, *arguments: object) -> str:
        return error_line(capsys, "hf_to_mcore", "--hf", hf, *arguments)

    tied, out = folders["tied"], tmp_path / "out"
    for kind in ("tensor", "pipeline", "expert"):
        assert f"--{kind}-parallel: 0 ranks" in line(tied, "--out", out, f"--{kind}-parallel", 0)
    assert "Qwen3ForCausalLM has no experts" in line(tied, "--out", out, "--expert-parallel", 2, "--dry-run")
    assert f"--out: {tied} exists already" in line(tied, "--out", tied)
    assert f"--hf: there is no folder {tmp_path}/none" in line(tmp_path / "none", "--out", out, "--tensor-parallel", 2)
    assert "tensor_parallel=3 does not divide" in line(tied, "--out", out, "--tensor-parallel", 3, "--dry-run")
    truncated = tmp_path / "truncated"
    shutil.copytree(tied, truncated)
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "model.safetensors is truncated" in line(truncated, "--out", out, "--tensor-parallel", 2)
    assert not out.exists()


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ({"tensor": 2, "pipeline": 2}, 4),
        ({"pipeline": 2, "expert": 2}, 4),
        ({"tensor": 2, "expert": 4}, 4),  # experts are cut over the tensor-parallel ranks too
        ({"tensor": 4, "expert": 6, "pipeline": 2}, 24),
    ],
)
def test_an_import_starts_as_many_ranks_as_its_layout_needs(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], ranks: int
) -> None:
    started: list[int] = []

    def start(arguments: Sequence[str], count: int, **options: object) -> int:
        started.append(count)
        return 0

    monkeypatch.setattr(launch, "launch_ranks", start)
    # the count follows from the sizes alone; whether a model allows them is checked before any rank starts
    monkeypatch.setattr("eaopd_megatron.models.supported.check_local_model", lambda *arguments: None)
    options = [word for kind, size in sizes.items() for word in (f"--{kind}-parallel", str(size))]
    assert main_of("hf_to_mcore")(["--hf", str(folders["tied"]), "--out", str(tmp_path / "out"), *options]) == 0
    assert started == [ranks]


def test_a_dry_run_lists_every_tensor_and_writes_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--hf", str(folders["tied"]), "--out", str(tmp_path / "out"), "--tensor-parallel", "4", "--dry-run"]
    assert main_of("hf_to_mcore")(arguments) == 0
    shown = capsys.readouterr().out
    for name in load_file(folders["tied"] / "model.safetensors"):
        assert f"{name} [" in shown
    assert "stage 0: decoder.layers.1.mlp.linear_fc1.weight [40, 48] x 4 = gated mlp(" in shown
    assert "embedding.word_embeddings.weight [128, 48] x 4 = vocabulary(" in shown
    assert not (tmp_path / "out").exists()


def test_the_export_refuses_what_is_no_checkpoint(
    folders: dict[str, Path], imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(checkpoint: object, out: object) -> str:
        return error_line(capsys, "mcore_to_hf", "--checkpoint", checkpoint, "--out", out)

    out = tmp_path / "out"
    assert "there is no folder" in line(tmp_path / "none", out)
    assert "neither an import nor a run's step folder" in line(folders["tied"], out)
    assert "exists already" in line(imported, folders["tied"])
    broken = tmp_path / "broken"
    shutil.copytree(imported, broken)
    (broken / "sharded" / ".metadata").write_bytes(b"?")
    assert f"{broken}/sharded: refused" in line(broken, out)
    (broken / "hf" / "config.json").unlink()
    assert "config.json is missing" in line(broken, out)
    assert not out.exists()
