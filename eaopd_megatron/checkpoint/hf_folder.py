"""A Hugging Face model folder: configuration, end-of-sequence ids, tokenizer, and lazily read tensors."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eaopd_megatron.checkpoint.published_formats import SCALE_SUFFIX, Fp8Tensor, foreign_format, is_buffer
from eaopd_megatron.checkpoint.safetensors_io import (
    FP8_DTYPE,
    SAFETENSORS_DTYPES,
    LazyTensor,
    TensorFiles,
    TensorLocation,
)
from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.models.digest import HUB_ID, model_digest, split_revision
from eaopd_megatron.models.families import family_of
from eaopd_megatron.models.mapping import Family
from eaopd_megatron.models.supported import check_model, max_positions
from eaopd_megatron.utils.files import read_json
from eaopd_megatron.utils.log import log_rank0

CONFIG_AND_TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_PAPERS = re.compile(r"(licen[cs]e|notice|copying|copyright|readme|use_policy)\b.*", re.IGNORECASE)
"""Names of the files without which a model may not be passed on, or is not understood."""
_HUB_PAPERS = ("LICEN?E*", "NOTICE*", "README*", "USE_POLICY*")
_HUB_FILES = [
    *("*.json", "*.safetensors", *_HUB_PAPERS),
    *(name for name in CONFIG_AND_TOKENIZER_FILES if not name.endswith(".json")),
]


class HfFolder:
    """A model folder whose config.json has been read. Weights and tokenizer are read on first use."""

    def __init__(self, path: Path, name: str, config: Any, family: Family) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.family = family
        self._checked = False

    @classmethod
    def open(cls, path: str, name: str = "model") -> HfFolder:
        """Open a local folder, or download the hub id `owner/name` or `owner/name@revision`.

        name: the folder's role for the user (`student.model`), which starts every error line.
        Raises UserError if the folder or config.json is missing or broken, or the architecture has no mapping.
        """
        folder = _find(path, name)
        label = f"{name}: {folder}"
        raw = read_json(folder / "config.json", label)
        family = family_of(raw.get("architectures"), label)
        from transformers import AutoConfig  # takes two seconds to import: check the path first

        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # any type, depending on the broken value
            raise UserError(f"{label}: config.json is broken: {_kind_and_text(error)}") from None
        return cls(folder, name, config, family)

    @property
    def label(self) -> str:
        """`name: path`, the start of an error line about this folder."""
        return f"{self.name}: {self.path}"

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, without Megatron's padding."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int:
        """Tokens that the model can take, prompt and response together."""
        found = max_positions(read_json(self.path / "config.json", self.label))
        return found or int(self.config.max_position_embeddings)

    @functools.cached_property
    def eos_ids(self) -> list[int]:
        """End-of-sequence ids, those of generation_config.json first; the tokenizer's if no configuration has one.

        If there are several, the tokenizer's own comes first: Llama 3 Instruct lists the end-of-text id before the
        end-of-turn id, but ends its answers with the latter.
        """
        eos_ids: list[int] = []
        # of the file: transformers gives a Llama configuration without one the id 2
        sources = [read_json(self.path / "config.json", self.label).get("eos_token_id")]
        if (self.path / "generation_config.json").exists():
            sources.insert(0, read_json(self.path / "generation_config.json", self.label).get("eos_token_id"))
        for value in sources:
            ids = value if isinstance(value, list) else [value]
            if len(ids) > 1 and self.has_tokenizer:
                own = self.tokenizer().eos_token_id
                ids = sorted(ids, key=lambda token: token != own)
            eos_ids += [int(token) for token in ids if token is not None and token not in eos_ids]
        if not eos_ids and self.has_tokenizer and (own := self.tokenizer().eos_token_id) is not None:
            eos_ids.append(int(own))
        return eos_ids

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return any((self.path / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))

    @functools.cached_property
    def files(self) -> TensorFiles:
        """The folder's safetensors files. Reads all headers; raises UserError if one is missing or damaged."""
        return TensorFiles(self.path, self.label)

    def names(self) -> list[str]:
        return list(self.files.locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header of its file."""
        return self.files.locations[name].shape

    def slice(self, name: str) -> LazyTensor | Fp8Tensor:
        """Return a lazy tensor, of which indexing reads only the requested rows and columns; FP8 as fp32 values."""
        tensor = self.files.slice(name)
        if tensor.location.dtype != FP8_DTYPE:
            return tensor
        quantization = getattr(self.config, "quantization_config", None) or {}
        return Fp8Tensor(tensor, self.files.slice(name + SCALE_SUFFIX)[:], quantization.get("weight_block_size"))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in the dtype of its file, or FP8 in fp32. Raises UserError if there is no such tensor."""
        return self.slice(name)[:]

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 if every weight is stored in bfloat16 or FP8, else float32, which represents the others exactly."""
        locations = self.files.locations
        stored = {locations[name].dtype for name in self.family.hf_shapes(self.config) if name in locations}
        return torch.bfloat16 if "BF16" in stored and stored <= {"BF16", FP8_DTYPE} else torch.float32

    @functools.cached_property
    def fingerprint(self) -> str:
        """`model_digest` of the folder. Raises UserError as `check_tensors` does."""
        self.check_tensors()
        return model_digest(self.path)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if not self.has_tokenizer:
            raise UserError(f"{self.label}: no tokenizer: tokenizer.json is missing")
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # any type
            raise UserError(f"{self.label}: the tokenizer cannot be loaded: {_kind_and_text(error)}") from None

    def tokenizer(self) -> Any:
        """Return the folder's tokenizer, loaded once. Raises UserError if there is none."""
        return self._tokenizer

    def transformers_model(self, dtype: torch.dtype) -> Any:
        """Return transformers' model in this dtype, from weights that are not quantised, whatever config.json says."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        if getattr(config, "quantization_config", None) is None:
            return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)
        del config.quantization_config
        names = self.family.hf_shapes(config)
        weights = {name: self.tensor(name).to(self.dtype).to(dtype) for name in names}  # FP8: rounded as in an import
        models: Any = AutoModelForCausalLM._model_mapping
        return models[type(config)].from_pretrained(None, config=config, state_dict=weights, dtype=dtype)

    def copy_config_and_tokenizer(self, out: Path) -> None:
        """Copy configuration, tokenizer, chat templates, licence, notice and README, that is, all but the weights.

        A `quantization_config` is left out: weights that are written beside it are not quantised.
        """
        found = [path for pattern in CONFIG_AND_TOKENIZER_FILES for path in self.path.glob(pattern)]
        found += [path for path in self.path.iterdir() if path.is_file() and _PAPERS.fullmatch(path.name)]
        for path in found:
            target = out / path.relative_to(self.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        config = read_json(out / "config.json", self.label)
        if config.pop("quantization_config", None) is not None:
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def check_tensors(self) -> None:
        """Raise UserError if the model is not supported, or a tensor is missing, unknown, or of the wrong shape or
        dtype. Tensors without meaning are skipped, with a line in the log."""
        if self._checked:
            return
        check_model(self.config.to_dict(), self.label)  # before its tensors are said to be wrong
        locations = self.files.locations
        expected = self.family.hf_shapes(self.config)
        missing = [name for name in expected if name not in locations]
        if missing:
            what = f"tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)"
            if kind := foreign_format(locations):
                what = f"its weights are quantised as {kind}, which is not read; use the unquantised model, or FP8"
            raise UserError(f"{self.label}: {what}")
        known = {*expected, *self.family.tied_copies(self.config)}
        known |= {name + SCALE_SUFFIX for name in known & locations.keys() if locations[name].dtype == FP8_DTYPE}
        others = [name for name in locations if name not in known]
        if unused := [name for name in others if not is_buffer(name)]:
            what = f"tensor {unused[0]} has no place in {self.family.architecture} ({len(unused)} such)"
            if kind := foreign_format(unused):
                what += f": its weights are quantised as {kind}, which is not read"
            raise UserError(f"{self.label}: {what}")
        for name, shape in expected.items():
            location = locations[name]
            if location.shape != shape:
                raise UserError(
                    f"{self.label}: tensor {name} has shape {list(location.shape)}, config.json asks for {list(shape)}"
                )
            self._check_dtype(name, location)
        self._check_tied_copies(locations)
        if others:
            log_rank0(f"{self.label}: skipped {len(others)} tensors that are no weights, {others[0]} first")
        if any(location.dtype == FP8_DTYPE for location in locations.values()):
            log_rank0(f"{self.label}: FP8 weights, dequantised as they are read")
        elif getattr(self.config, "quantization_config", None):
            log_rank0(f"{self.label}: config.json has a quantization_config, but no weight is quantised: ignored")
        self._checked = True

    def _check_dtype(self, name: str, location: TensorLocation) -> None:
        if location.dtype == FP8_DTYPE and len(location.shape) == 2:
            if name + SCALE_SUFFIX not in self.files.locations:
                raise UserError(f"{self.label}: tensor {name} is FP8, and its scales {name + SCALE_SUFFIX} are missing")
            self.slice(name)  # which compares the shapes
        elif location.dtype not in SAFETENSORS_DTYPES:
            supported = ", ".join(sorted(SAFETENSORS_DTYPES))
            raise UserError(
                f"{self.label}: tensor {name} is stored as {location.dtype}; supported: {supported}, and matrices in "
                f"{FP8_DTYPE} with scales"
            )

    def _check_tied_copies(self, locations: Mapping[str, TensorLocation]) -> None:
        for tied, original in self.family.tied_copies(self.config).items():
            if tied in locations and not self._same(tied, original):
                raise UserError(
                    f"{self.label}: {tied} differs from {original} although config.json ties them; "
                    "set tie_word_embeddings to false, or remove one"
                )

    def _same(self, left: str, right: str, rows: int = 8192) -> bool:
        shape = self.shape(left)
        if shape != self.shape(right):
            return False
        one, other = self.slice(left), self.slice(right)
        return all(torch.equal(one[i : i + rows], other[i : i + rows]) for i in range(0, shape[0], rows))


def check_same_tokenizer(teacher: HfFolder, student: HfFolder, *, allowed: str = "exact") -> list[int]:
    """Return the ids that stand for other texts in the teacher's tokenizer than in the student's, sorted.

    allowed: "exact", none; "shared", those of added and special tokens. Raises UserError for the first other one.
    """
    texts = [
        {token_id: text for text, token_id in folder.tokenizer().get_vocab().items()} for folder in (teacher, student)
    ]
    different = sorted(i for i in texts[0].keys() | texts[1].keys() if texts[0].get(i) != texts[1].get(i))
    added = [
        {*folder.tokenizer().get_added_vocab().values(), *folder.tokenizer().all_special_ids}
        for folder in (teacher, student)
    ]
    ordinary = [i for i in different if any(i in text and i not in own for text, own in zip(texts, added, strict=True))]
    refused = different if allowed == "exact" else ordinary
    if refused:
        first = refused[0]
        theirs, ours = (repr(text[first]) if first in text else "nothing" for text in texts)
        key = teacher.name.removesuffix(".model")
        remedy = "" if ordinary else f"; {key}.tokenizer_check=shared allows added and special tokens that differ"
        raise UserError(
            f"{teacher.name} and {student.name} have different tokenizers: token {first} is {theirs} in {teacher.path} "
            f"and {ours} in {student.path}{remedy}"
        )
    return different


def common_vocab_size(folders: Sequence[HfFolder]) -> int:
    """Return the vocabulary size shared by models with the same tokenizer: the smallest one.

    Raises UserError if it is too small for a token of the tokenizer or for an end-of-sequence id.
    """
    smallest = min(folders, key=lambda folder: folder.vocab_size)
    highest = max([*smallest.tokenizer().get_vocab().values(), *(i for folder in folders for i in folder.eos_ids)])
    if highest >= smallest.vocab_size:
        raise UserError(
            f"{smallest.label}: its vocabulary size is {smallest.vocab_size}, "
            f"too small for token {highest} of the tokenizer"
        )
    return smallest.vocab_size


def _find(path: str, name: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name}: {path} is a file; give the Hugging Face folder that holds config.json")
    if not HUB_ID.fullmatch(path):
        raise UserError(f"{name}: there is no folder {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        hub_id, revision = split_revision(path)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError:
        reason = "the Hugging Face hub has no such model, or not for you"
    except RevisionNotFoundError:
        reason = f"the Hugging Face hub's {hub_id} has no revision {revision}"
    except LocalEntryNotFoundError:
        reason = "the Hugging Face hub cannot be reached and the model is not in its cache"
    except Exception as error:  # any network, disk or hub fault
        reason = f"its download failed: {_kind_and_text(error)}"
    raise UserError(f"{name}: there is no folder {path}, and {reason}")


def _kind_and_text(error: Exception) -> str:
    """Return an error of several lines as one: transformers names the key in the first, the reason in the others."""
    text = one_line(error)[:400]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
