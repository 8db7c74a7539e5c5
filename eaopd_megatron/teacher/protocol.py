"""What a separate teacher is asked and what it answers, in bytes.

POST /score   u32 length of the header, the header as JSON, then int32 token ids; little-endian
              → the rows [response tokens, `Rows.bytes`] of all samples, one after another
GET /info     → `Info` as JSON: what this teacher is
GET /ready    → 200 once it scores

A request has an id of its own. One that comes again while the first is still worked on (its connection dropped) waits
for the same work; nothing else is remembered between requests, and a request is scored as one micro-batch whatever
comes with it, so its answer is a function of the request alone.
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
"""Of this file; a teacher of another one is refused."""
MAX_HEADER_BYTES = 2**24  # bytes


class ScoredSample(NamedTuple):
    """A sample as the teacher sees it. label: id under which the last response token is looked up, or −1: its own."""

    prompt: int  # tokens
    response: int  # tokens
    target_id: int = -1


@dataclass(frozen=True)
class ScoreRequest:
    """token_ids: of all samples, prompts and responses."""

    id: str
    samples: Sequence[ScoredSample]
    token_ids: torch.Tensor  # [T] int32

    @property
    def response_tokens(self) -> int:
        """Response tokens."""
        return sum(sample.response for sample in self.samples)

    def has_same_content(self, other: ScoreRequest) -> bool:
        """Whether the answer is the same."""
        return list(self.samples) == list(other.samples) and torch.equal(self.token_ids, other.token_ids)

    def encode(self) -> bytes:
        """The body of POST /score."""
        header = json.dumps({"id": self.id, "samples": self.samples}, separators=(",", ":")).encode()
        return struct.pack("<I", len(header)) + header + self.token_ids.int().numpy().astype("<i4").tobytes()

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Raises ValueError, in one line, for a body that is none; ids are not compared with a vocabulary."""
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
            raise ValueError("a sample has no prompt, or fewer than no response tokens")
        if sum(s.prompt + s.response for s in samples) != len(ids):
            raise ValueError(f"{len(ids)} token ids came, which are not the samples' lengths")
        return request


@dataclass(frozen=True)
class TeacherInfo:
    """What a teacher is: all of it must be what the recipe asks for."""

    model: str  # its path or hub id, for messages
    fingerprint: str  # of its weights and configuration: `HfFolder.fingerprint`
    signal: str  # "hidden" | "topk"
    top_k: int
    width: int  # of its hidden states
    dtype: str  # of its hidden states: "fp32" | "bf16"
    vocab_size: int  # tokens over which top-k log-probs are normalised
    terminal: tuple[str, int, int]  # kind, student's id, teacher's id
    max_tokens: int  # of a request
    layout: str  # for messages
    protocol: int = PROTOCOL_VERSION

    @property
    def payload_format(self) -> PayloadFormat:
        """Of its answers."""
        if self.signal == "topk":
            return TopKPayload(self.top_k)
        return HiddenStatePayload(self.width, {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Raises ValueError for what no teacher of this protocol says."""
        if not isinstance(found, dict) or found.get("protocol") != PROTOCOL_VERSION:
            raise ValueError("it is no eaopd teacher of this version")
        try:
            kind, *ids = found.pop("terminal")
            return cls(**found, terminal=(kind, *ids))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"it is no eaopd teacher of this version ({error})") from None


def build_teacher_info(
    recipe: Recipe, options: TeacherConfig, student: HfFolder, folder: HfFolder, *, layout: str = ""
) -> TeacherInfo:
    """folder: the teacher's. It reads a little of every tensor for the fingerprint. Raises UserError for a folder that
    is not whole."""
    terminal = TerminalMap.between(options.terminal_map, student.eos_ids, folder.eos_ids)
    vocab_size = min(student.vocab_size, folder.vocab_size)
    return TeacherInfo(
        model=options.model,
        fingerprint=folder.fingerprint,
        signal=recipe.resolve_signal(options),
        top_k=min(recipe.objective.build_objective().top_k, vocab_size),
        width=int(folder.config.hidden_size),
        dtype="fp32" if options.precision == "fp32" else "bf16",  # fp8 is the weights'
        vocab_size=vocab_size,
        terminal=(terminal.kind, terminal.student_id, terminal.teacher_id),
        max_tokens=max(
            recipe.train.micro_batch_tokens, recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
        ),
        layout=layout,
    )
