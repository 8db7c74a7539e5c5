"""What a model is, whatever its path: a digest of its folder, and hub ids with a revision. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eaopd_megatron.utils.files import read_json

HUB_ID = re.compile(
    r"(?![^@]*--)(?!.*\.\.)(?![^@]*\.git(?:@|$))\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?(@[\w./-]+)?", re.ASCII
)
"""A model of the Hugging Face hub: owner/name, or owner/name@REVISION (a commit, branch or tag)."""
_IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version")
"""Keys of config.json that do not describe the model."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PIECE_BYTES = 512


def split_revision(model: str) -> tuple[str, str | None]:
    """Return a hub id without its revision, and the revision."""
    name, _, revision = model.partition("@")
    return name, revision or None


def local_folder(model: str) -> Path | None:
    """Return the folder that a recipe's model names, here or in the hub's cache; None where neither has it."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(model):
        return None
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(model)
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def model_digest(folder: Path) -> str:
    """Return a digest of a model, equal for copies in other folders or differently split files.

    Covers config.json without `_name_or_path` and `transformers_version`, and of each tensor its name, dtype, shape and
    three pieces of 512 bytes at its begin, middle and end. It takes seconds at any size and tells checkpoints of a
    training apart, but may miss an edit of a few elements. A folder without weights has its config.json's digest.
    Raises OSError, ValueError or KeyError for damaged files, UserError for a damaged config.json.
    """
    config = read_json(folder / "config.json", str(folder))
    settings = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    found = {name: (file, item) for file, name, item in _headers(folder)}
    if config.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)  # a copy that only some folders hold
    for name in sorted(found):
        (file, base), item = found[name]
        start, end = item["data_offsets"]
        digest.update(f"{name} {item['dtype']} {item['shape']}".encode())
        size = min(_PIECE_BYTES, end - start)
        with file.open("rb", buffering=0) as stream:
            for place in (start, start + (end - start - size) // 2, end - size):
                stream.seek(base + place)
                digest.update(stream.read(size))
    return digest.hexdigest()


def _headers(folder: Path) -> Iterator[tuple[tuple[Path, int], str, Mapping[str, Any]]]:
    """Yield each tensor of a folder: its file and where the data begin there, its name, its entry in the header."""
    weight_map: Mapping[str, str] | None = None
    if (folder / INDEX_FILE).exists():
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    elif not (folder / SINGLE_FILE).exists():
        return
    for name in sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]:
        with (folder / name).open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for tensor, item in header.items():
            if tensor != "__metadata__" and (weight_map is None or weight_map.get(tensor) == name):
                yield (folder / name, 8 + length), tensor, item
