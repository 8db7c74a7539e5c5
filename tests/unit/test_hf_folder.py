"""Hugging Face folders: what is read from them, and one clear line for each fault."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config

from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer, common_vocab_size
from eaopd_megatron.checkpoint.safetensors_io import LazyTensor, PlannedTensor, TensorWriter
from eaopd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 20,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    LAYER + "self_attn.q_proj.weight": (12, 8),
    LAYER + "self_attn.k_proj.weight": (6, 8),
    LAYER + "self_attn.v_proj.weight": (6, 8),
    LAYER + "self_attn.o_proj.weight": (8, 12),
    LAYER + "self_attn.q_norm.weight": (6,),
    LAYER + "self_attn.k_norm.weight": (6,),
    LAYER + "input_layernorm.weight": (8,),
    LAYER + "post_attention_layernorm.weight": (8,),
    LAYER + "mlp.gate_proj.weight": (12, 8),
    LAYER + "mlp.up_proj.weight": (12, 8),
    LAYER + "mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def write_config(folder: Path, **changes: Any) -> None:
    options = {"tie_word_embeddings": False, "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 3}
    Qwen3Config(**{**SIZES, **options, **changes}).save_pretrained(folder)


def write_sharded(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    parts = {
        "model-00001-of-00002.safetensors": list(weights)[:5],
        "model-00002-of-00002.safetensors": list(weights)[5:],
    }
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_tokenizer(folder: Path, words: list[str]) -> None:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0]).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder in one file."""
    write_config(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def refusal(action: Callable[[], object]) -> str:
    """The one line of the UserError."""
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(folder: Path) -> str:
    return refusal(lambda: HfFolder.open(str(folder), "student.model").check_tensors())


@pytest.mark.parametrize("sharded", [False, True])
def test_sharded_and_single_files_give_the_same_tensors(tmp_path: Path, sharded: bool) -> None:
    weights = tensors()
    write_config(tmp_path)
    if sharded:
        write_sharded(tmp_path, weights)
    else:
        save_file(weights, tmp_path / "model.safetensors")
    opened = HfFolder.open(str(tmp_path))
    opened.check_tensors()
    assert sorted(opened.names()) == sorted(weights)
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in weights.items())
    assert torch.equal(opened.slice("lm_head.weight")[3:5, 2:4], weights["lm_head.weight"][3:5, 2:4])


@pytest.mark.parametrize("block", [1, 50, 2**24])
def test_parts_of_a_tensor_are_those_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Columns are read over blocks of rows, of which the last one is shorter."""
    monkeypatch.setattr(LazyTensor, "BLOCK", block)
    whole, lazy = (
        load_file(folder / "model.safetensors")["lm_head.weight"],
        HfFolder.open(str(folder)).slice("lm_head.weight"),
    )
    rows, columns = whole.shape
    for start, end in itertools.combinations(range(0, rows + 3, 3), 2):
        assert torch.equal(lazy[start:end], whole[start:end])
    for start, end in itertools.combinations(range(columns + 1), 2):
        assert torch.equal(lazy[:, start:end], whole[:, start:end])
        assert torch.equal(lazy[2:7, start:end], whole[2:7, start:end])


def test_a_file_cut_short_while_it_is_read_is_named(folder: Path) -> None:
    lazy = HfFolder.open(str(folder), "student.model").slice("model.norm.weight")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: lazy.location.start + 1])
    assert refusal(lambda: lazy[:]) == f"student.model: {folder}: model.safetensors ends inside a tensor"


def test_a_copy_of_a_model_is_taken_for_another(tmp_path: Path) -> None:
    weights = tensors()
    for name in ("one", "copy"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name)
    save_file(weights, tmp_path / "one" / "model.safetensors")
    write_sharded(tmp_path / "copy", weights)
    path = tmp_path / "copy" / "config.json"
    config = dict(reversed(json.loads(path.read_text()).items()))
    path.write_text(json.dumps(config | {"_name_or_path": "elsewhere", "transformers_version": "0"}))
    one, copy = (HfFolder.open(str(tmp_path / name)).fingerprint for name in ("one", "copy"))
    assert one == copy


@pytest.mark.parametrize("change", ["weights", "dtype", "config"])
def test_another_checkpoint_of_the_same_shape_is_taken_for_the_model(folder: Path, change: str) -> None:
    before, weights = HfFolder.open(str(folder)).fingerprint, load_file(folder / "model.safetensors")
    if change == "config":
        write_config(folder, rms_norm_eps=1e-3)
    elif change == "dtype":
        save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    else:
        last = LAYER + "mlp.down_proj.weight"
        save_file(weights | {last: weights[last] + 1e-3}, folder / "model.safetensors")
    assert HfFolder.open(str(folder)).fingerprint != before


def test_every_end_of_sequence_id_is_found_the_generation_config_first(folder: Path) -> None:
    """A model that stops at two ids would run on past the second."""
    assert HfFolder.open(str(folder)).eos_ids == [3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3]}))
    assert HfFolder.open(str(folder)).eos_ids == [7, 3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert HfFolder.open(str(folder)).eos_ids == [5, 3]


@pytest.mark.parametrize("changes", [{}, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}], ids=str)
def test_a_model_never_ends_that_only_its_tokenizer_knows_to_end(tmp_path: Path, changes: dict[str, object]) -> None:
    """transformers gives a Llama configuration without an end id the number 2."""
    shutil.copytree(ROOT / "recipes/countdown/student", tmp_path / "chat")
    (tmp_path / "chat/generation_config.json").unlink(missing_ok=True)
    path = tmp_path / "chat/config.json"
    config = json.loads(path.read_text()) | changes
    config.pop("eos_token_id", None)
    path.write_text(json.dumps(config))
    folder = HfFolder.open(str(tmp_path / "chat"))
    assert folder.eos_ids == [folder.tokenizer().eos_token_id]


def test_an_end_of_text_is_taken_for_the_end_of_a_turn(tmp_path: Path) -> None:
    """An instructed Llama 3 lists both, the wrong one first; its tokenizer's is the one with which it ends."""
    shutil.copytree(ROOT / "recipes/countdown/student", tmp_path / "chat")
    own = HfFolder.open(str(tmp_path / "chat")).tokenizer().eos_token_id
    (tmp_path / "chat/generation_config.json").write_text(json.dumps({"eos_token_id": [100, 101, own]}))
    assert HfFolder.open(str(tmp_path / "chat")).eos_ids == [own, 100, 101]
    (tmp_path / "chat/generation_config.json").write_text(json.dumps({"eos_token_id": 100}))
    assert HfFolder.open(str(tmp_path / "chat")).eos_ids == [100, own]


def test_bf16_is_kept_and_anything_wider_is_read_as_fp32(folder: Path) -> None:
    assert HfFolder.open(str(folder)).dtype == torch.float32
    save_file({name: tensor.bfloat16() for name, tensor in tensors().items()}, folder / "model.safetensors")
    assert HfFolder.open(str(folder)).dtype == torch.bfloat16


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    line = refusal(lambda: HfFolder.open(str(tmp_path / "nowhere"), "student.model"))
    assert line == f"student.model: there is no folder {tmp_path}/nowhere"


def test_a_hub_id_that_cannot_be_reached_says_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped relative path looks like a hub id: the line must speak of the folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(lambda: HfFolder.open("recipes/countdwon", "teacher.model"))
    assert line.startswith(
        "teacher.model: there is no folder recipes/countdwon, and the Hugging Face hub cannot be reached"
    )


def test_a_file_in_the_place_of_the_folder_is_refused(folder: Path) -> None:
    assert "is a file" in refusal(lambda: HfFolder.open(str(folder / "model.safetensors")))


def test_config_missing_or_broken_names_the_place(folder: Path) -> None:
    (folder / "config.json").write_text('{\n"architectures": [}')
    assert "config.json is no JSON: line 2" in check(folder)
    (folder / "config.json").write_text(
        '{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": "x"}'
    )
    assert "config.json is broken" in check(folder)
    (folder / "config.json").unlink()
    assert check(folder) == f"student.model: {folder}: config.json is missing"


def test_an_unknown_architecture_names_the_supported_ones(folder: Path) -> None:
    write_config(folder, architectures=["MambaForCausalLM"])
    line = check(folder)
    assert "MambaForCausalLM is not supported; supported: Qwen3ForCausalLM" in line
    assert "models/" in line


def test_a_truncated_file_is_named_with_both_sizes(folder: Path) -> None:
    """The header is whole, so that names and shapes look right, and safetensors would fail in the middle of a load."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert (
        f"model.safetensors is truncated: its header promises {len(whole)} bytes, the file has {len(whole) - 100}"
        in (check(folder))
    )
    file.write_bytes(whole + b"x")
    assert "model.safetensors is damaged" in check(folder)
    file.write_bytes(whole[:40])
    assert "model.safetensors ends inside its header (40 bytes)" in check(folder)
    file.write_bytes(b"")
    assert "model.safetensors ends inside its header (0 bytes)" in check(folder)
    file.write_bytes(whole[:8] + b"!" + whole[9:])
    assert "model.safetensors has a broken header" in check(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in check(folder)


def test_missing_weights_and_shards_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "no weights" in check(folder)
    write_sharded(folder, weights)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert check(folder) == f"student.model: {folder}: model-00002-of-00002.safetensors is missing"
    save_file({"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    assert "which does not hold it" in check(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in check(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(folder: Path) -> None:
    weights = tensors()
    gone = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors")
    assert "tensor model.norm.weight is missing (1 of 14 are)" in check(folder)
    save_file({**weights, "model.norm.weight": gone, "extra.bias": torch.ones(1)}, folder / "model.safetensors")
    assert "tensor extra.bias has no place in Qwen3ForCausalLM" in check(folder)
    save_file({**weights, "model.norm.weight": torch.ones(9)}, folder / "model.safetensors")
    assert "tensor model.norm.weight has shape [9], config.json asks for [8]" in check(folder)
    save_file({**weights, "model.norm.weight": torch.ones(8, dtype=torch.int8)}, folder / "model.safetensors")
    assert "tensor model.norm.weight is stored as I8; supported: BF16, F16, F32" in check(folder)


def test_a_copy_of_a_tied_embedding_is_accepted_only_while_it_is_one(folder: Path) -> None:
    """Published tied models carry lm_head too; one that differs would be dropped in silence."""
    write_config(folder, tie_word_embeddings=True)
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    HfFolder.open(str(folder)).check_tensors()
    weights["lm_head.weight"][19, 7] += 1
    save_file(weights, folder / "model.safetensors")
    assert "lm_head.weight differs from model.embed_tokens.weight" in check(folder)


def pair(tmp_path: Path, student_words: list[str], student_size: int) -> tuple[HfFolder, HfFolder]:
    found = []
    for name, words, size in (("teacher", ["?", "a", "b", "c"], 20), ("student", student_words, student_size)):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, vocab_size=size)
        write_tokenizer(tmp_path / name, words)
        found.append(HfFolder.open(str(tmp_path / name), f"{name}.model"))
    return found[0], found[1]


def test_the_same_tokenizer_is_accepted(tmp_path: Path) -> None:
    check_same_tokenizer(*pair(tmp_path, ["?", "a", "b", "c"], 20))


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["?", "a", "x", "c"], "token 2 is 'b' in {teacher} and 'x' in {student}"),
        (["?", "a", "b"], "token 3 is 'c' in {teacher} and nothing in {student}"),
    ],
)
def test_the_first_differing_token_is_shown(tmp_path: Path, words: list[str], difference: str) -> None:
    """A teacher that scores other texts than the student wrote distils noise."""
    line = refusal(lambda: check_same_tokenizer(*pair(tmp_path, words, 20)))
    assert line.endswith(difference.format(teacher=tmp_path / "teacher", student=tmp_path / "student"))


@pytest.mark.parametrize(("student_size", "common"), [(24, 20), (20, 20), (8, 8)])
def test_models_of_one_tokenizer_may_have_other_sizes(tmp_path: Path, student_size: int, common: int) -> None:
    """Published sizes of one family are 151,936 and 152,064."""
    folders = pair(tmp_path, ["?", "a", "b", "c"], student_size)
    check_same_tokenizer(*folders)
    assert common_vocab_size(folders) == common


def test_a_size_too_small_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    """Its tokens would be looked up in the padding's rows."""
    line = refusal(lambda: common_vocab_size(pair(tmp_path, ["?", "a", "b", "c"], 3)))
    assert line.startswith(f"student.model: {tmp_path / 'student'}: ")
    assert line.endswith("its vocabulary size is 3, too small for token 3 of the tokenizer")


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    assert "no tokenizer" in refusal(HfFolder.open(str(folder), "student.model").tokenizer)


@pytest.mark.parametrize(("limit", "count"), [(10**9, 1), (130, 2), (1, 4)])
def test_written_files_are_read_by_safetensors(tmp_path: Path, limit: int, count: int) -> None:
    """One file, or several with an index; a tensor larger than the limit has one to itself."""
    weights = {"a": torch.randn(4, 5), "b": torch.randn(7), "c": torch.randn(3, 20), "d": torch.randn(2, 2)}
    plan = [PlannedTensor(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in weights.items()]
    with TensorWriter(tmp_path, plan, limit) as writer:
        for name, tensor in weights.items():
            writer.write(name, tensor)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == count
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights.items())
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(weights)


def test_a_tensor_out_of_plan_is_not_written(tmp_path: Path) -> None:
    plan = [PlannedTensor("a", (2,), torch.float32), PlannedTensor("b", (2,), torch.float32)]
    with pytest.raises(ValueError, match="planned a"), TensorWriter(tmp_path, plan, 100) as writer:
        writer.write("b", torch.ones(2))
    with pytest.raises(ValueError, match="1 planned tensors"), TensorWriter(tmp_path, plan, 100) as writer:
        writer.write("a", torch.ones(2))
