"""The HTTP protocol of a separate teacher.

POST /score   u32 length of the header, the header as JSON, then int32 token ids; little-endian
              → the payload [response tokens, bytes_per_token] of all samples, one after another
GET /info     → `TeacherInfo` as JSON: what this teacher is
GET /ready    → 200 once it scores

A request has an id of its own. If it comes again while the first is in progress (its connection dropped), it waits for
the same work; nothing else is remembered between requests. A request is scored as one micro-batch, so its answer is a
function of the request alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import HiddenStatePayload, PayloadFormat, TopKPayload

PROTOCOL_VERSION = 1
"""A teacher of another version is refused."""
MAX_HEADER_BYTES = 2**24


class ScoredSample(NamedTuple):
    """A sample in a request. target_id: id whose log p is looked up for the last response token, or −1: its own."""

    prompt: int  # tokens
    response: int  # tokens
    target_id: int = -1


@dataclass(frozen=True)
class ScoreRequest:
    """token_ids [T] int32: prompt and response of each sample, one after another."""

    id: str
    samples: Sequence[ScoredSample]
    token_ids: torch.Tensor

    @property
    def response_tokens(self) -> int:
        return sum(sample.response for sample in self.samples)

    def has_same_content(self, other: ScoreRequest) -> bool:
        """Return whether the other request has the same answer."""
        return list(self.samples) == list(other.samples) and torch.equal(self.token_ids, other.token_ids)

    def encode(self) -> bytes:
        """Return the body of POST /score."""
        header = json.dumps({"id": self.id, "samples": self.samples}, separators=(",", ":")).encode()
        return struct.pack("<I", len(header)) + header + self.token_ids.int().numpy().astype("<i4").tobytes()

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Parse a body. Raises ValueError, in one line, for an invalid one; does not check ids against a vocabulary."""
        try:
            (length,) = struct.unpack_from("<I", body)
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(body[4 : 4 + length])
            samples = [ScoredSample(*map(int, sample)) for sample in header["samples"]]
            ids = torch.frombuffer(bytearray(body[4 + length :]), dtype=torch.int32)
            request = cls(str(header["id"]), samples, ids)
        except (struct.error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the request cannot be read: {type(error).__name__}: {error}") from None
        if any(s.prompt < 1 or s.response < 0 for s in samples):
            raise ValueError("a sample has no prompt, or a negative number of response tokens")
        if (expected := sum(s.prompt + s.response for s in samples)) != len(ids):
            raise ValueError(f"{len(ids)} token ids came; the samples' lengths add up to {expected}")
        return request


@dataclass(frozen=True)
class TeacherInfo:
    """What a teacher is. All of it but model and layout must be what the recipe asks for."""

    model: str  # path or hub id, for messages
    fingerprint: str  # of weights and configuration: `HfFolder.fingerprint`
    signal: str  # "hidden" | "topk"
    top_k: int
    width: int  # of the hidden states
    dtype: str  # of the hidden states: "fp32" | "bf16"
    vocab_size: int  # ids over which top-k log-probs are normalised
    terminal: tuple[str, int, int]  # kind, student's id, teacher's id
    max_tokens: int  # of a request
    layout: str  # for messages
    protocol: int = PROTOCOL_VERSION
    masked_ids: tuple[int, ...] = ()  # ids left out by teacher.tokenizer_check=shared

    @property
    def terminal_map(self) -> TerminalMap:
        return TerminalMap(*self.terminal, self.masked_ids)

    @property
    def payload_format(self) -> PayloadFormat:
        if self.signal == "topk":
            return TopKPayload(self.top_k)
        return HiddenStatePayload(self.width, {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Raises ValueError for anything but the answer of a teacher with this protocol."""
        if not isinstance(values, dict) or values.get("protocol") != PROTOCOL_VERSION:
            raise ValueError("it is no eaopd teacher of this version")
        try:
            kind, *ids = values["terminal"]
            return cls(**{**values, "terminal": (kind, *ids), "masked_ids": tuple(values.get("masked_ids", ()))})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"it is no eaopd teacher of this version ({error})") from None


def build_teacher_info(
    recipe: Recipe,
    config: TeacherConfig,
    student: HfFolder,
    folder: HfFolder,
    terminal: TerminalMap,
    *,
    layout: str = "",
) -> TeacherInfo:
    """Return the description of the teacher in `folder`, whose ids `terminal` translates into the student's. Reads a
    little of every tensor, for the fingerprint. Raises UserError for an incomplete folder."""
    vocab_size = min(student.vocab_size, folder.vocab_size)
    return TeacherInfo(
        model=config.model,
        fingerprint=folder.fingerprint,
        signal=recipe.resolve_signal(config),
        top_k=min(recipe.objective.build_objective().top_k, vocab_size),
        width=int(folder.config.hidden_size),
        dtype="fp32" if config.precision == "fp32" else "bf16",  # fp8 is the precision of weights alone
        vocab_size=vocab_size,
        terminal=(terminal.kind, terminal.student_id, terminal.teacher_id),
        masked_ids=terminal.masked_ids,
        max_tokens=max(
            recipe.train.micro_batch_tokens, recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
        ),
        layout=layout,
    )
