"""A model folder from a stranger: no header and no index leads to bytes that are not the tensors, or to a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eaopd_megatron.checkpoint.safetensors_io import TensorFiles
from eaopd_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"first.weight": torch.randn(8), "matrix.weight": torch.randn(4, 8), "model.norm.weight": torch.randn(8)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def check(folder: Path) -> str:
    """The one line of the UserError."""
    with pytest.raises(UserError) as caught:
        TensorFiles(folder, f"student.model: {folder}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _header(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write_header(folder: Path, text: str | bytes, data: bytes) -> None:
    raw = text.encode() if isinstance(text, str) else text
    raw += b" " * (-len(raw) % 8)
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def _swap_shape(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [4]


def _other_dtype(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["dtype"] = "BF16"


def _negative(header: dict[str, Any]) -> None:
    start, end = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["data_offsets"] = [start - end - 4, -4]


def _reversed(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"].reverse()


def _overlapping(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["first.weight"]["data_offsets"]


def _one_offset(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = [0]


def _text_as_shape(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = "8"


def _number_as_tensor(header: dict[str, Any]) -> None:
    header["model.norm.weight"] = 7


def _huge_offset(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = [2**70, 2**70 + 32]


def _nested_metadata(header: dict[str, Any]) -> None:
    header["__metadata__"] = {"format": {"of": "x"}}


@pytest.mark.parametrize(
    "spoil",
    [
        *(_swap_shape, _other_dtype, _negative, _reversed, _overlapping),
        *(_one_offset, _text_as_shape, _number_as_tensor, _huge_offset, _nested_metadata),
    ],
)
def test_a_header_that_safetensors_refuses_is_refused(folder: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    header, data = _header(folder)
    spoil(header)
    _write_header(folder, json.dumps(header), data)
    line = check(folder)
    assert line.startswith(f"student.model: {folder}: model.safetensors ") and "\n" not in line
    assert "header" in line


@pytest.mark.parametrize(
    "text",
    [b"[]", b"7", b"null", b"[" * 100_000, b"\xff\xfe{}", b'{"a":' * 5000, b'{"a":1e999}', b'{"__metadata__":[]}'],
)
def test_a_header_that_is_no_object_of_tensors_is_one_line(folder: Path, text: bytes) -> None:
    _write_header(folder, text, b"")
    line = check(folder)
    assert "model.safetensors" in line and "\n" not in line


def test_a_tensor_that_stands_twice_in_a_header_is_refused(folder: Path) -> None:
    """Readers differ in which one they take."""
    header, data = _header(folder)
    twice = json.dumps(header)[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}"
    _write_header(folder, twice, data)
    assert "model.safetensors has a broken header" in check(folder)


@pytest.mark.parametrize(
    "file",
    [
        *("../secret/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"),
        *("..", "a\x00.safetensors", ["x"], None, "config.json"),
    ],
)
def test_an_index_leads_to_no_file_elsewhere(folder: Path, file: object) -> None:
    weights = load_file(folder / "model.safetensors")
    secret = folder.parent / "secret"
    secret.mkdir(exist_ok=True)
    save_file(weights, secret / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "it must name a safetensors file of the same folder" in check(folder)
