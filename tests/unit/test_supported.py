"""All commands refuse an unsupported model in the same words, before a rank starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.cli import main
from eaopd_megatron.config import load_recipe
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.supported import check_recipe_models, check_supported
from tools import hf_to_mcore

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/countdown/eopd.yaml")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DENSE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
ROPE = {"rope_theta": 1e4, "factor": 2.0}
TP2, PP3, VP3 = {"tensor_parallel": 2}, {"pipeline_parallel": 3}, {"pipeline_parallel": 2, "virtual_pipeline": 3}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    # family, keys of config.json, layout, the sentence
    ("llama", {"hidden_act": "gelu"}, {}, "hidden_act 'gelu' is not supported; supported: silu"),
    ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}, {}, "hidden_act 'gelu_pytorch_tanh' is not supported"),
    ("llama", {"mlp_bias": True}, {}, "mlp_bias=true is not supported; LlamaForCausalLM is supported with mlp_b"),
    ("llama", {"attention_bias": True}, {}, "attention_bias=true is not supported"),
    ("qwen3", {"attention_bias": True}, {}, "attention_bias=true is not supported"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, {}, "use_sliding_window=true is not supported"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, {}, "use_sliding_window=true is not supported"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, {}, "use_sliding_window=true is not supported"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, {}, "decoder_sparse_step=2 is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, {}, "mlp_only_layers=[0] is not supported"),
    ("qwen3_moe", {"num_experts_per_tok": 7}, {}, "num_experts_per_tok=7 is not between 1 and num_experts=6"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, {}, "num_experts_per_tok=1 with norm_topk_prob gives the router no"),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, {}, "rope_type 'dynamic' is not supported"),
    ("qwen2", {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "rope_type 'dyn"),
    ("qwen3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {}, "partial_rotary_factor=0.5"),
    ("qwen3", {"num_key_value_heads": 3}, {}, "num_key_value_heads=3 does not divide num_attention_heads=8"),
    (
        "qwen3",
        {"num_attention_heads": 6, "num_key_value_heads": 1},
        TP2,
        "tensor_parallel=2 does not divide num_key_va",
    ),
    ("qwen2", {"num_attention_heads": 9, "num_key_value_heads": 9}, TP2, "tensor_parallel=2 does not divide num_atten"),
    ("llama", {"intermediate_size": 81}, TP2, "tensor_parallel=2 does not divide intermediate_size=81"),
    ("llama", {}, PP3, "pipeline_parallel=3 does not divide num_hidden_layers=4"),
    ("llama", {}, VP3, "pipeline_parallel=2 x virtual_pipeline=3 does not divide num_hidden_layers=4"),
    ("qwen3", {}, {"expert_parallel": 2}, "Qwen3ForCausalLM has no experts; set expert_parallel and expert_tensor_par"),
    ("qwen3_moe", {}, {"expert_parallel": 4}, "expert_parallel=4 does not divide num_experts=6"),
    ("qwen3_moe", {}, {"expert_tensor_parallel": 3}, "expert_tensor_parallel=3 does not divide moe_intermediate_size"),
    ("qwen3_moe", {}, TP2, "experts under tensor_parallel=2 need sequence_parallel=true, or every rank would send"),
]


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("eaopd_megatron.launch.local_ranks.launch_ranks", refuse)
    monkeypatch.setattr("eaopd_megatron.diagnostics.eos_check.launch_ranks", refuse)
    monkeypatch.setattr("eaopd_megatron.diagnostics.machine.check_machine", lambda: 0)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command; the line that it ends with."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def write(folder: Path, kind: str, changes: dict[str, Any]) -> str:
    experts = EXPERTS if kind == "qwen3_moe" else {}
    config = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **DENSE, **experts, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("kind", "changes", "layout", "sentence"), CASES, ids=[case[3][:60] for case in CASES])
def test_commands_disagree_about_a_model(
    answer: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
    layout: dict[str, Any],
    sentence: str,
) -> None:
    folder = write(tmp_path / "model", kind, changes)
    with pytest.raises(UserError) as refused:
        check_supported(json.loads((tmp_path / "model/config.json").read_text()), ParallelLayout(**layout), "label")
    full = str(refused.value).removeprefix("label: ")
    assert full.startswith(sentence)
    keys = [f"student.{key}={value}" for key, value in layout.items()]
    recipe = (RECIPE, f"student.model={folder}", f"teacher.model={folder}", f"run.folder={tmp_path}/run", *keys)
    expected = f"error: student.model: {folder}: {full}"
    assert answer("train", *recipe) == expected
    assert answer("doctor", *recipe) == expected
    assert answer("plan", *recipe).startswith(expected)
    options = {"tensor": "tensor_parallel", "pipeline": "pipeline_parallel", "expert": "expert_parallel"}
    own_sequence_parallel = kind == "qwen3_moe" and layout == TP2  # the conversion sets it
    if layout.keys() <= set(options.values()) and not own_sequence_parallel:
        sizes = [f"--{short}-parallel={layout[key]}" for short, key in options.items() if key in layout]
        arguments = [f"--hf={folder}", f"--out={tmp_path}/out", *sizes]
        assert hf_to_mcore.main(arguments) == 1
        assert capsys.readouterr().err.strip() == f"error: --hf: {folder}: {full}"
    if layout.keys() <= {"tensor_parallel"} and kind != "qwen3_moe":
        sizes = [f"--tensor-parallel={layout.get('tensor_parallel', 1)}"]
        said = answer("evaluate", folder, "countdown", *sizes, f"--out={tmp_path}/evaluation")
        assert said == f"error: MODEL: {folder}: {full}"


def test_a_teacher_is_not_checked_before_its_ranks_start(answer: Callable[..., str], tmp_path: Path) -> None:
    gelu, fine = write(tmp_path / "gelu", "llama", {"hidden_act": "gelu"}), write(tmp_path / "fine", "llama", {})
    refusal = f"{gelu}: hidden_act 'gelu' is not supported; supported: silu"
    recipe = (RECIPE, f"student.model={fine}", f"run.folder={tmp_path}/run")
    assert answer("train", *recipe, f"teacher.model={gelu}") == f"error: teacher.model: {refusal}"
    apart = (*recipe, f"teacher.model={gelu}", "teacher.placement=separate")
    assert answer("train", *apart) == answer("teach", *apart) == f"error: teacher.model: {refusal}"
    several = (*recipe, f"teachers.a.model={fine}", f"teachers.b.model={gelu}")
    assert answer("train", *several) == f"error: teachers.b.model: {refusal}"


def test_expert_parallelism_is_applied_to_a_dense_model_beside_experts(tmp_path: Path) -> None:
    dense, experts = write(tmp_path / "dense", "qwen3", {}), write(tmp_path / "experts", "qwen3_moe", {})
    cut = ["student.tensor_parallel=1", "student.expert_parallel=2", "student.data_parallel=2"]
    check_recipe_models(load_recipe(RECIPE, [f"student.model={dense}", f"teacher.model={experts}", *cut]))
    check_recipe_models(load_recipe(RECIPE, [f"student.model={dense}", "teacher.model=not/here", *cut]))
    with pytest.raises(UserError, match="has no experts"):
        check_recipe_models(load_recipe(RECIPE, [f"student.model={dense}", f"teacher.model={dense}", *cut]))


def test_the_check_imports_torch() -> None:
    program = (
        "import sys; from eaopd_megatron.config import load_recipe; "
        "from eaopd_megatron.models.supported import check_recipe_models; "
        f"check_recipe_models(load_recipe({RECIPE!r}, [])); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
