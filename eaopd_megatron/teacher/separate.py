"""A teacher on ranks of its own (`eaopd teach`), as the student's ranks ask it: its client and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from eaopd_megatron.data.packing import split_into_micro_batches
from eaopd_megatron.data.types import Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.client import Busy
from eaopd_megatron.teacher.client import TeacherClient
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.wire import Info, Scored, ScoreRequest


@dataclass(frozen=True)
class TokenLimit:
    """What a replica can take: tokens of a request."""

    max_tokens: int

    def intersect(self, other: TokenLimit) -> TokenLimit:
        return min(self, other, key=lambda limit: limit.max_tokens)


@dataclass(frozen=True)
class Scoring:
    """A request as a pool's call. It has the same id on every attempt: a replica that still works on it goes on."""

    request: ScoreRequest
    row_bytes: int

    @property
    def id(self) -> str:
        return self.request.id

    def validate(self, limits: TokenLimit) -> None:
        """Raises UserError."""
        if (tokens := len(self.request.token_ids)) > limits.max_tokens:
            raise UserError(f"a request of {tokens} tokens is longer than the teacher's {limits.max_tokens}")

    async def attempt(self, client: TeacherClient, number: int) -> torch.Tensor:
        """[response tokens, row_bytes] uint8. Raises ServerGone, Busy, UserError."""
        count = self.request.rows
        return (await client.score(self.request.encode(), count * self.row_bytes)).view(count, self.row_bytes)


class SeparateSource:
    """`remote.Source` of replicas that were started with `eaopd teach`."""

    def __init__(
        self, wanted: Info, *, budget: int, terminal: TerminalMap, connections: int, label: str = "teacher"
    ) -> None:
        """wanted: what the recipe asks for; its max_tokens is not looked at. budget: tokens of a request, of more than
        one sample. connections: requests that a replica gets at the same time. label: the recipe's key of the teacher.
        """
        self._wanted, self._budget, self._terminal = wanted, budget, terminal
        self._connections, self._label = connections, label

    def calls(self, samples: Sequence[Sample], number: str) -> list[tuple[Scoring, Sequence[Sample]]]:
        """As `Source.calls`: consecutive samples of at most the budget's tokens together."""
        parts = split_into_micro_batches(samples, self._budget)
        size = self._wanted.row_format.bytes
        return [(Scoring(self._request(part, f"{number}-{i}"), size), part) for i, part in enumerate(parts)]

    def _request(self, samples: Sequence[Sample], name: str) -> ScoreRequest:
        scored = []
        for sample in samples:
            label = self._terminal.label(sample) if self._wanted.signal == "topk" else None
            prompt, response = len(sample.prompt.token_ids), len(sample.response_ids)
            scored.append(Scored(prompt, response, -1 if label is None else label))
        ids = [token for sample in samples for token in sample.token_ids]
        return ScoreRequest(name, scored, torch.tensor(ids, dtype=torch.int32))

    def client(self, url: str, key: str | None) -> TeacherClient:
        """As `Source.client`."""
        return TeacherClient(url, api_key=key, connections=self._connections, key_setting=f"{self._label}.api_key_file")

    async def admit(self, client: TeacherClient, longest: int) -> TokenLimit:
        """As `Source.admit`."""
        if not await client.ready():
            raise Busy("it does not score yet")
        found = await client.info()
        compare(client.url, found, replace(self._wanted, max_tokens=max(longest, self._budget)), self._label)
        return TokenLimit(found.max_tokens)


def compare(url: str, found: Info, wanted: Info, label: str) -> None:
    """Raises UserError, in one line, where a replica is another teacher than the recipe's. wanted.max_tokens: of the
    longest request."""
    topk = wanted.signal == "topk"
    for name, key, matters in (
        ("fingerprint", f"{label}.model", True),
        ("signal", f"{label}.signal", True),
        ("terminal", f"{label}.terminal_map", True),
        ("vocab_size", "student.model (vocabulary)", True),
        ("top_k", "objective.top_k", topk),
        ("width", f"{label}.model (hidden size)", not topk),
        ("dtype", f"{label}.precision", not topk),
    ):
        if matters and getattr(found, name) != getattr(wanted, name):
            raise UserError(
                f"the teacher at {url} has another {key} than this recipe: {_shown(name, found)} there, "
                f"{_shown(name, wanted)} here; "
                "start it again with `eaopd teach` and this recipe"
            )
    if found.max_tokens < wanted.max_tokens:
        raise UserError(
            f"the teacher at {url} takes requests of {found.max_tokens} tokens, and this recipe's have up to "
            f"{wanted.max_tokens} (train.micro_batch_tokens, rollout.max_response_tokens): start it again with "
            "`eaopd teach` and this recipe"
        )


def _shown(name: str, info: Info) -> str:
    if name == "fingerprint":
        return f"{info.model} ({info.fingerprint})"
    if name == "terminal":
        kind, student, teacher = info.terminal
        return f"{kind} (student {student}, teacher {teacher})"
    return str(getattr(info, name))
