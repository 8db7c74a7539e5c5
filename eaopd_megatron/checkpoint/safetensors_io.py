"""Read and write safetensors files one tensor at a time.

The safetensors package maps files: mapped pages count as the process's memory, and a file that shrinks meanwhile ends
the process with SIGBUS. It therefore only checks the headers. Reading only the requested bytes keeps an import's
transient memory within twice the largest tensor and turns an I/O error into a message. The package's writer needs all
tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.models.digest import INDEX_FILE, SINGLE_FILE
from eaopd_megatron.utils.files import read_json

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAFETENSORS_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
FP8_DTYPE = "F8_E4M3"
_MAX_HEADER_BYTES = 10**8  # as the safetensors package
_FILE_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
"""A file in the folder itself: an index from a stranger may name any path."""
_READABLE_DTYPES = {**SAFETENSORS_DTYPES, FP8_DTYPE: torch.float8_e4m3fn}


@dataclass(frozen=True)
class TensorLocation:
    """Position of a tensor: file, first byte, dtype as safetensors spells it, shape."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class LazyTensor:
    """A tensor in its file. Indexing by `[a:b]`, `[:, a:b]` or `[:]` reads these elements into new memory."""

    BLOCK = 2**24
    """Bytes of complete rows read at a time when only some columns are requested."""

    def __init__(self, location: TensorLocation, label: str) -> None:
        self.location = location
        self.label = label
        self.dtype = _READABLE_DTYPES[location.dtype]

    def get_shape(self) -> Sequence[int]:
        """Return the shape (the method of safetensors' own slices)."""
        return self.location.shape

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, None)
        shape = self.location.shape or (1,)
        start, end, _ = rows.indices(shape[0])
        if columns is None:
            return self._rows(start, max(start, end)).reshape(-1, *self.location.shape[1:])
        first, last, _ = columns.indices(shape[1])
        out = torch.empty(end - start, last - first, dtype=self.dtype)
        step = max(1, self.BLOCK // (shape[1] * self.dtype.itemsize))
        for row in range(start, end, step):
            block = self._rows(row, min(row + step, end)).reshape(-1, shape[1])
            out[row - start : row - start + step] = block[:, first:last]
        return out

    def _rows(self, start: int, end: int) -> torch.Tensor:
        width = math.prod(self.location.shape[1:])
        out = torch.empty((end - start) * width, dtype=self.dtype)
        unread = out.view(torch.uint8).numpy().data
        try:
            with self.location.file.open("rb", buffering=0) as stream:
                stream.seek(self.location.start + start * width * self.dtype.itemsize)
                while unread:
                    count = stream.readinto(unread)
                    if not count:
                        raise UserError(f"{self.label}: {self.location.file.name} ends inside a tensor")
                    unread = unread[count:]
        except OSError as error:
            raise UserError(
                f"{self.label}: {self.location.file.name} cannot be read: {error.strerror or error}"
            ) from None
        return out


def read_header(file: Path, label: str) -> dict[str, TensorLocation]:
    """Return the tensors in a safetensors file. Raises UserError for a header that the safetensors package refuses."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise UserError(f"{label}: {file.name} is a git-lfs pointer, not the weights; run `git lfs pull` there")
            if len(start) < 8 or 8 + length > size:
                raise UserError(
                    f"{label}: {file.name} ends inside its header ({size} bytes): truncated or no safetensors"
                )
            if length > _MAX_HEADER_BYTES:
                raise UserError(f"{label}: {file.name} has a broken header: it would be {length} bytes long")
            text = stream.read(length)
        refusal = _library_refusal(file)
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        promised = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        if promised != size:
            what = "truncated" if size < promised else "damaged"
            raise UserError(
                f"{label}: {file.name} is {what}: its header promises {promised} bytes, the file has {size}"
            )
        if refusal is None:
            return {
                name: TensorLocation(file, 8 + length + item["data_offsets"][0], item["dtype"], tuple(item["shape"]))
                for name, item in header.items()
            }
    except FileNotFoundError:
        raise UserError(f"{label}: {file.name} is missing") from None
    except OSError as error:
        raise UserError(f"{label}: {file.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        refusal = one_line(error, 200)
    raise UserError(f"{label}: {file.name} has a broken header, is no safetensors file, or damaged: {refusal}")


def _library_refusal(file: Path) -> str | None:
    """Return why the safetensors package refuses a file's header, or None. It compares dtype and shape of each tensor
    with its offsets, and the offsets with each other and the file. It maps the file, but touches only the header."""
    try:
        with safe_open(file, "pt"):
            return None
    except SafetensorError as error:
        return one_line(error, 200)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a key that occurs twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


class TensorFiles:
    """The tensors of a Hugging Face folder, in one file or in several with an index. Reads headers and slices only."""

    def __init__(self, folder: Path, label: str) -> None:
        self.label = label
        self.locations: dict[str, TensorLocation] = {}
        single, indexed = (folder / SINGLE_FILE).exists(), (folder / INDEX_FILE).exists()
        if indexed:
            self._read_index(folder)
        elif single:
            self.locations = read_header(folder / SINGLE_FILE, label)
        elif shards := sorted(folder.glob("model-*-of-*.safetensors")):
            raise UserError(f"{label}: {INDEX_FILE} is missing, which says what {shards[0].name} and the others hold")
        else:
            raise UserError(
                f"{label}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there (only safetensors are read)"
            )

    def _read_index(self, folder: Path) -> None:
        weight_map = read_json(folder / INDEX_FILE, self.label).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{self.label}: {INDEX_FILE} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise UserError(
                    f"{self.label}: {INDEX_FILE} places tensor {name} in {one_line(repr(file), 100)}; it must name a "
                    "safetensors file of the same folder"
                )
        files = set(weight_map.values())
        if files != {SINGLE_FILE} and (folder / SINGLE_FILE).exists():
            raise UserError(
                f"{self.label}: it holds two sets of weights: transformers reads {SINGLE_FILE}, SGLang the files of "
                f"{INDEX_FILE}; remove the one that is out of date"
            )
        headers = {file: read_header(folder / file, self.label) for file in sorted(files)}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{self.label}: {INDEX_FILE} places tensor {name} in {file}, which does not hold it")
            self.locations[name] = headers[file][name]

    def slice(self, name: str) -> LazyTensor:
        """Return a lazy tensor. Raises UserError if there is no such tensor."""
        if name not in self.locations:
            raise UserError(f"{self.label}: tensor {name} is missing")
        if (dtype := self.locations[name].dtype) not in _READABLE_DTYPES:
            supported = ", ".join(sorted(_READABLE_DTYPES))
            raise UserError(f"{self.label}: tensor {name} is stored as {dtype}; supported: {supported}")
        return LazyTensor(self.locations[name], self.label)


@dataclass(frozen=True)
class PlannedTensor:
    """Name, shape and dtype of a tensor that is going to be written or sent."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes planned tensors one after another into safetensors files, holding one tensor at a time.

    A file takes tensors up to max_shard_bytes (at least one tensor). Several files get an index.
    """

    def __init__(self, folder: Path, plan: Sequence[PlannedTensor], max_shard_bytes: int) -> None:
        self.folder = folder
        self.groups: list[list[PlannedTensor]] = []
        filled = 0
        for tensor in plan:
            if not self.groups or filled + tensor.nbytes > max_shard_bytes:
                self.groups.append([])
                filled = 0
            self.groups[-1].append(tensor)
            filled += tensor.nbytes
        count = len(self.groups)
        self.files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            self.files = [SINGLE_FILE]
        self._order = [(g, t) for g, group in enumerate(self.groups) for t in group]
        self._next = 0
        self._stream: Any = None

    def __enter__(self) -> TensorWriter:
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next planned tensor. Raises ValueError if another one was planned."""
        group, planned = self._order[self._next]
        if (name, tuple(tensor.shape)) != (planned.name, planned.shape):
            raise ValueError(f"planned {planned.name} {planned.shape}, got {name} {tuple(tensor.shape)}")
        if self.groups[group][0] is planned:
            self._begin(group)
        data = tensor.detach().to("cpu", planned.dtype).contiguous()
        self._stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._next += 1

    def _begin(self, group: int) -> None:
        self._end()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.groups[group]:
            end = offset + tensor.nbytes
            header[tensor.name] = {
                "dtype": SAFETENSORS_DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._stream = (self.folder / self.files[group]).open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def _end(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with stream:
                stream.flush()
                os.fsync(stream.fileno())

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            if self._stream is not None:
                self._stream.close()
            return
        self._end()
        if self._next != len(self._order):
            raise ValueError(f"{len(self._order) - self._next} planned tensors were not written")
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": sum(t.nbytes for _, t in self._order)},
                "weight_map": {t.name: self.files[g] for g, t in self._order},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
