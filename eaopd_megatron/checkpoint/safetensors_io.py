"""A folder's safetensors files: what their headers say, slices read on demand, and tensors written one by one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from eaopd_megatron.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAFETENSORS_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies: its file and first byte there, its dtype as safetensors spells it, its shape."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class LazyTensor:
    """A tensor in its file: `[a:b]`, `[:, a:b]` and `[:]` read what they name into memory of their own.

    Nothing is mapped: a mapped file's pages count as the process's memory until the file is closed.
    """

    BLOCK = 2**24
    """Bytes of whole rows that are read at a time where some columns of them are wanted."""

    def __init__(self, place: TensorLocation, label: str) -> None:
        self.place = place
        self.label = label
        self.dtype = SAFETENSORS_DTYPES[place.dtype]

    def get_shape(self) -> Sequence[int]:
        """As safetensors' slices have it."""
        return self.place.shape

    def __getitem__(self, wanted: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = wanted if isinstance(wanted, tuple) else (wanted, None)
        shape = self.place.shape or (1,)
        start, end, _ = rows.indices(shape[0])
        if columns is None:
            return self._rows(start, max(start, end)).reshape(-1, *self.place.shape[1:])
        first, last, _ = columns.indices(shape[1])
        out = torch.empty(end - start, last - first, dtype=self.dtype)
        step = max(1, self.BLOCK // (shape[1] * self.dtype.itemsize))
        for row in range(start, end, step):
            block = self._rows(row, min(row + step, end)).reshape(-1, shape[1])
            out[row - start : row - start + step] = block[:, first:last]
        return out

    def _rows(self, start: int, end: int) -> torch.Tensor:
        width = math.prod(self.place.shape[1:])
        out = torch.empty((end - start) * width, dtype=self.dtype)
        left = out.view(torch.uint8).numpy().data
        try:
            with self.place.file.open("rb", buffering=0) as stream:
                stream.seek(self.place.start + start * width * self.dtype.itemsize)
                while left:
                    count = stream.readinto(left)
                    if not count:
                        raise UserError(f"{self.label}: {self.place.file.name} ends inside a tensor")
                    left = left[count:]
        except OSError as error:
            raise UserError(f"{self.label}: {self.place.file.name} cannot be read: {error.strerror or error}") from None
        return out


def read_json(path: Path, label: str) -> dict[str, Any]:
    """The object in a JSON file. UserError names the file and the place of the fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{label}: {path.name} is missing") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{label}: {path.name} is no JSON: line {error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label}: {path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{label}: {path.name} holds no JSON object")
    return content


def read_header(file: Path, label: str) -> dict[str, TensorLocation]:
    """The tensors that a safetensors file promises. UserError where the file is not as long as its header says."""
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
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            places = {
                name: TensorLocation(file, 8 + length + item["data_offsets"][0], item["dtype"], tuple(item["shape"]))
                for name, item in header.items()
            }
            promised = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
    except FileNotFoundError:
        raise UserError(f"{label}: {file.name} is missing") from None
    except OSError as error:
        raise UserError(f"{label}: {file.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{label}: {file.name} has a broken header: it is no safetensors file, or damaged") from None
    if promised != size:
        what = "truncated" if size < promised else "damaged"
        raise UserError(f"{label}: {file.name} is {what}: its header promises {promised} bytes, the file has {size}")
    return places


class TensorFiles:
    """The tensors of a Hugging Face folder, in one file or several with an index; only headers and slices are read."""

    def __init__(self, folder: Path, label: str) -> None:
        self.label = label
        self.locations: dict[str, TensorLocation] = {}
        if (folder / INDEX_FILE).exists():
            self._read_index(folder)
        elif (folder / SINGLE_FILE).exists():
            self.locations = read_header(folder / SINGLE_FILE, label)
        else:
            raise UserError(
                f"{label}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there (only safetensors are read)"
            )

    def _read_index(self, folder: Path) -> None:
        weight_map = read_json(folder / INDEX_FILE, self.label).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{self.label}: {INDEX_FILE} has no weight_map")
        headers = {file: read_header(folder / file, self.label) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{self.label}: {INDEX_FILE} places tensor {name} in {file}, which does not hold it")
            self.locations[name] = headers[file][name]

    def slice(self, name: str) -> LazyTensor:
        """A lazy tensor: `[a:b]`, `[:, a:b]` and `[:]` read what they name. UserError where there is none."""
        if name not in self.locations:
            raise UserError(f"{self.label}: tensor {name} is missing")
        return LazyTensor(self.locations[name], self.label)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes planned tensors one after another into safetensors files, so that no more than one is ever held.

    A file takes tensors up to max_shard_bytes (one tensor at least). More than one file gets an index.
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
        """Append the next planned tensor. ValueError where it is not the one that was planned."""
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
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
