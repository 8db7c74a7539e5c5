"""What published folders hold beside plain weights, and conversions that `--verify` must accept or refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eaopd_megatron.checkpoint import convert
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import build_model
from eaopd_megatron.models.supported import check_recipe_models
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors") | more
    save_file(weights, folder / "model.safetensors")
    return weights


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(folder: Path) -> None:
    HfFolder.open(str(folder), "--hf").check_tensors()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.build("qwen3_untied", hidden_size=160, intermediate_size=300).bfloat16().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def quantise(folder: Path, scaling: str) -> dict[str, torch.Tensor]:
    """Store the projections as FP8; return the values that they stand for, in fp32, computed block by block."""
    values, stored = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            values[name], stored[name] = weight.float(), weight
            continue
        rows, columns = weight.shape
        height, width = {"block": (128, 128), "tensor": (rows, columns), "row": (1, columns)}[scaling]
        scales = torch.empty(-(-rows // height), -(-columns // width))
        stored[name], values[name] = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scales[i, j] = weight[at].float().abs().max() / 448
                stored[name][at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
                values[name][at] = stored[name][at].float() * scales[i, j]
        stored[name + "_scale_inv"] = scales.reshape(()) if scaling == "tensor" else scales
    save_file(stored, folder / "model.safetensors")
    edit_config(folder, quantization_config=FP8)
    return values


@pytest.mark.parametrize("scaling", ["block", "tensor", "row"])
def test_fp8_weights_are_read_as_other_values(folder: Path, scaling: str) -> None:
    values = quantise(folder, scaling)
    opened = HfFolder.open(str(folder))
    opened.check_tensors()
    assert opened.dtype == torch.bfloat16
    for name, expected in values.items():
        assert torch.equal(opened.tensor(name).float(), expected)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        lazy, expected = opened.slice(name), values[name]
        for rows in (slice(0, 1), slice(37, 131), slice(128, 160), slice(90, 90)):
            assert torch.equal(lazy[rows], expected[rows])
            assert torch.equal(lazy[rows, 100:150], expected[rows, 100:150])
        assert torch.equal(lazy[:, 127:129], expected[:, 127:129])


def test_an_fp8_folder_cannot_be_imported_and_exported(folder: Path, tmp_path: Path) -> None:
    values = quantise(folder, "block")
    lines: list[str] = []
    with convert.single_process_group() as parallel:
        convert.import_folder(str(folder), tmp_path / "imported", parallel, verify=True, log=lines.append)
    convert.export_checkpoint(tmp_path / "imported", tmp_path / "out", verify=True, log=lines.append)
    assert sum(line.startswith("verify: largest difference") for line in lines) == 2
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == values.keys()
    assert all(torch.equal(written[name], value.bfloat16()) for name, value in values.items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())  # they are not quantised


def test_faulty_scales_are_not_named(folder: Path) -> None:
    quantise(folder, "block")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name + "_scale_inv": torch.ones(3, 3)}, folder / "model.safetensors")
    assert "scales of shape [3, 3] do not fit an FP8 tensor of shape [300, 160]" in refusal(lambda: check(folder))
    del weights[name + "_scale_inv"]
    save_file(weights, folder / "model.safetensors")
    assert f"tensor {name} is FP8, and its scales {name}_scale_inv are missing" in refusal(lambda: check(folder))
    save_file({**weights, name: weights[name].view(torch.float8_e5m2)}, folder / "model.safetensors")
    assert f"tensor {name} is stored as F8_E5M2" in refusal(lambda: check(folder))


@pytest.mark.parametrize("block", [[128], [0, 0], [128, 128, 128], "128", {"rows": 128}, None])
def test_a_block_size_of_another_form_ends_in_a_traceback(folder: Path, block: Any) -> None:
    quantise(folder, "block")
    edit_config(folder, quantization_config=FP8 | {"weight_block_size": block})
    assert f"weight_block_size is {block!r}" in refusal(lambda: check(folder))


def test_scales_of_another_type_end_in_a_traceback(folder: Path) -> None:
    quantise(folder, "block")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    edit_weights(folder, **{name: torch.ones(3, 2, dtype=torch.float64)})
    assert f"tensor {name} is stored as F64; supported: BF16" in refusal(lambda: check(folder))


def test_a_copy_of_a_tied_embedding_has_a_type_and_scales_of_its_own(tmp_path: Path) -> None:
    tiny_models.build("qwen3", hidden_size=160).bfloat16().save_pretrained(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, **{"lm_head.weight": table.double()})
    assert "tensor lm_head.weight is stored as F64" in refusal(lambda: check(tmp_path))
    scales = torch.full((-(-table.shape[0] // 128), 2), 1 / 64)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_weights(tmp_path, **{name: (table * 64).to(torch.float8_e4m3fn), name + "_scale_inv": scales})
    edit_config(tmp_path, quantization_config=FP8)
    check(tmp_path)
    edit_weights(tmp_path, **{"lm_head.weight_scale_inv": scales * 2})
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(lambda: check(tmp_path))


def test_fp8_weights_of_compressed_tensors_are_told_as_unknown_tensors(folder: Path) -> None:
    quantise(folder, "row")
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("_scale_inv", "_scale"): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    assert "its weights are quantised as compressed-tensors" in refusal(lambda: check(folder))


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_other_quantised_formats_are_told_as_missing_tensors(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    line = refusal(lambda: check(folder))
    assert f"quantised by '{method}', of which only 'fp8' is read" in line
    recipe = load_recipe(str(ROOT / "recipes/countdown/eopd.yaml"), [f"student.model={folder}"])
    assert refusal(lambda: check_recipe_models(recipe)).endswith(line.partition(": quantization_config")[2])


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("qweight", "AWQ or GPTQ"), ("weight_packed", "compressed-tensors"), ("weight.absmax", "bitsandbytes")],
)
def test_a_quantised_folder_without_its_setting_is_told_as_missing_tensors(
    folder: Path, suffix: str, kind: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj." + suffix] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors")
    assert f"its weights are quantised as {kind}" in refusal(lambda: check(folder))


def test_a_left_over_quantization_config_ends_in_a_traceback(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(folder, quantization_config=FP8)
    lines: list[str] = []
    with convert.single_process_group() as parallel:
        convert.import_folder(str(folder), tmp_path / "imported", parallel, verify=True, log=lines.append)
    assert any(line.startswith("verify: largest difference") for line in lines)
    assert "quantization_config, but no weight is quantised: ignored" in capsys.readouterr().out


def test_sglang_serves_a_quantised_student(folder: Path) -> None:
    edit_config(folder, quantization_config=FP8)
    changes = [f"student.model={folder}", f"teacher.model={folder}", "rollout.engine=sglang"]
    line = refusal(lambda: check_recipe_models(load_recipe(str(ROOT / "recipes/countdown/eopd.yaml"), changes)))
    assert line.startswith(f"student.model: {folder}: config.json has a quantization_config")


def test_buffers_without_meaning_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    edit_weights(folder, **more, **{"model.layers.0.self_attn.k_scale": torch.ones(1)})
    check(folder)
    assert "skipped 3 tensors that are no weights" in capsys.readouterr().out
    edit_weights(folder, **{"model.layers.0.mlp.gate_proj.bias": torch.ones(8)})
    assert "gate_proj.bias has no place" in refusal(lambda: check(folder))


def test_one_of_two_sets_of_weights_is_read_in_silence(folder: Path) -> None:
    """transformers reads the single file, SGLang the shards; which one is out of date nobody can know here."""
    shutil.copytree(folder, folder.with_name("shards"))
    tiny_models.build("qwen3_untied").save_pretrained(folder.with_name("shards"), max_shard_size="100KB")
    for file in folder.with_name("shards").glob("model-*"):
        shutil.copy(file, folder)
    check(folder)  # shards that no index names are read by nobody
    shutil.copy(folder.with_name("shards") / "model.safetensors.index.json", folder)
    assert "two sets of weights: transformers reads model.safetensors, SGLang the files of" in refusal(
        lambda: check(folder)
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check(folder)  # some converters write an index of their single file
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json is missing" in refusal(lambda: check(folder))


def test_tensors_are_complained_about_before_the_configuration(tmp_path: Path) -> None:
    tiny_models.build("llama3").save_pretrained(tmp_path)
    edit_config(tmp_path, attention_bias=True)
    edit_weights(tmp_path, **{"model.layers.0.self_attn.k_proj.bias": torch.ones(64)})
    assert "attention_bias=true is not supported" in refusal(lambda: check(tmp_path))


def test_the_reason_of_a_broken_configuration_is_lost(folder: Path) -> None:
    edit_config(folder, hidden_size="many")
    line = refusal(lambda: check(folder))
    assert "hidden_size" in line
    assert "int" in line
    assert "many" in line


def test_papers_and_templates_stay_behind(folder: Path, tmp_path: Path) -> None:
    papers = ["LICENSE", "licence.txt", "NOTICE.md", "README.md", "USE_POLICY.md", "chat_template.jinja"]
    papers += ["additional_chat_templates/tool_use.jinja", "generation_config.json"]
    for name in [*papers, "training_args.bin", "noticed.py"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (tmp_path / "out").mkdir()
    HfFolder.open(str(folder)).copy_config_and_tokenizer(tmp_path / "out")
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == {*papers, "config.json"}


@pytest.fixture(scope="module")
def large_logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 layers, logits above 20."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}
    model = tiny_models.build("llama_tied", **sizes, initializer_range=0.03, max_position_embeddings=64)
    tokens = torch.randint(1024, (2, 48))
    with torch.no_grad():
        model.model.norm.weight.mul_(25 / model(tokens).logits.abs().max())
        assert model(tokens).logits.abs().max() > 20
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", range(4))
def test_a_right_conversion_of_large_logits_is_refused(large_logits: Path, tmp_path: Path, variant: int) -> None:
    """Weights x (1 + 0.002 noise), at two threads, where transformers' own rounding is far above 1e-5."""
    shutil.copytree(large_logits, tmp_path / "m")
    torch.manual_seed(variant)
    weights = load_file(large_logits / "model.safetensors")
    noisy = {name: weight * (1 + 0.002 * torch.randn_like(weight)) for name, weight in weights.items()}
    save_file(noisy, tmp_path / "m/model.safetensors")
    opened = HfFolder.open(str(tmp_path / "m"))
    lines: list[str] = []
    with convert.single_process_group() as parallel:
        model = build_model(opened.config, parallel.layout, torch.float32)
        load_hf(model, opened, parallel)
        convert.verify_model(model, opened, parallel, lines.append)
    assert lines[0].startswith("verify: 218 tensors equal")
    assert lines[1].startswith("verify: largest difference")


def test_the_limit_lies_below_the_rounding_of_transformers_or_far_above(large_logits: Path) -> None:
    """The measured rounding is that of fp32 beside fp64, within a factor of the limit's room on either side."""
    opened = HfFolder.open(str(large_logits))
    tokens = torch.randint(1024, (2, 48), generator=torch.Generator().manual_seed(1))
    exact, rounding = convert._reference_logprobs(opened, tokens)
    with torch.no_grad():
        wide = torch.log_softmax(opened.transformers_model(torch.float32).double().eval()(tokens).logits, -1)
    error = convert._distance(exact, wide)
    assert error / 4 < rounding < error * 4


def _swap_heads(weights: dict[str, torch.Tensor], layer: int) -> None:
    heads = weights[QKV.format(layer)].view(4, 4, 16, -1)  # per group two queries, key and value
    heads[:, 1], heads[:, 2] = heads[:, 2].clone(), heads[:, 1].clone()


def _interleave_rotary(weights: dict[str, torch.Tensor], layer: int) -> None:
    heads = weights[QKV.format(layer)].view(4, 4, 16, -1)
    heads[:, :3] = heads[:, :3].unflatten(2, (2, 8)).transpose(2, 3).flatten(2, 3)


def _perturb(weights: dict[str, torch.Tensor], layer: int) -> None:
    weights[f"decoder.layers.{layer}.mlp.linear_fc2.weight"].mul_(1.01)


@pytest.mark.parametrize("layer", [0, 11, 23])
@pytest.mark.parametrize("change", [_swap_heads, _interleave_rotary, _perturb])
def test_a_wrong_conversion_is_accepted(
    large_logits: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, torch.Tensor], int], None],
    layer: int,
) -> None:
    """By the tensors, and by the log-probs alone, as of a mapping whose way back makes the same mistake."""
    opened = HfFolder.open(str(large_logits))
    with convert.single_process_group() as parallel:
        model = build_model(opened.config, parallel.layout, torch.float32)
        load_hf(model, opened, parallel)
        with torch.no_grad():
            change(dict(model.global_parameters()), layer)
        assert "is not that of the folder" in refusal(lambda: convert.verify_model(model, opened, parallel, print))
        monkeypatch.setattr(convert, "_compare_tensors", lambda *arguments: None)
        assert "verify failed: largest diff" in refusal(lambda: convert.verify_model(model, opened, parallel, print))
