"""Client of a teacher on ranks of its own (`eaopd teach`), and its requests for scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from eaopd_megatron.data.packing import split_into_micro_batches
from eaopd_megatron.data.types import Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import Busy, HttpClient, HttpResponse
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import ScoredSample, ScoreRequest, TeacherInfo


class TeacherClient(HttpClient):
    """Client of one `eaopd teach`."""

    key_setting = "teacher.api_key_file"

    async def score(self, body: bytes, size: int) -> torch.Tensor:
        """POST /score; return the answer's `size` bytes [size] uint8.

        Raises ServerGone at once, Busy after `timeouts.attempts`, and UserError for a request that it refuses or an
        answer of another size.
        """
        answer = await self.fetch("POST", "/score", body, seconds=self.timeouts.generate, size=size)
        content = answer.content
        if len(content) != size:
            raise UserError(f"{self.url}/score answered {len(content)} bytes, and not {size}: it is another teacher")
        return torch.frombuffer(content if isinstance(content, bytearray) else bytearray(content), dtype=torch.uint8)

    async def info(self) -> TeacherInfo:
        """Return what this teacher is. Raises as `score`, and UserError for a server that is no such teacher."""
        answer: HttpResponse = await self.fetch("GET", "/info", b"", attempts=1)
        try:
            return TeacherInfo.from_json(json.loads(answer.content))
        except ValueError as error:
            raise UserError(
                f"{self.url} cannot be used: {error}; start it with `eaopd teach` of this version"
            ) from None


@dataclass(frozen=True)
class TokenLimit:
    """Maximum number of tokens that a replica accepts in a request."""

    max_tokens: int

    def intersect(self, other: TokenLimit) -> TokenLimit:
        return TokenLimit(min(self.max_tokens, other.max_tokens))


@dataclass(frozen=True)
class SeparateScoreCall:
    """A request for scores, as a `PoolCall`. Its id is the same in every attempt: a replica that still works on it
    continues."""

    request: ScoreRequest
    row_bytes: int

    @property
    def id(self) -> str:
        return self.request.id

    def validate(self, limits: TokenLimit) -> None:
        """Raise UserError for a request that is too long."""
        if (tokens := len(self.request.token_ids)) > limits.max_tokens:
            raise UserError(f"a request of {tokens} tokens is longer than the teacher's {limits.max_tokens}")

    async def attempt(self, client: TeacherClient, number: int) -> torch.Tensor:
        """Return [response tokens, row_bytes] uint8. Raises ServerGone, Busy, UserError."""
        count = self.request.response_tokens
        return (await client.score(self.request.encode(), count * self.row_bytes)).view(count, self.row_bytes)


class SeparateBackend:
    """`remote.Source` of replicas that were started with `eaopd teach`."""

    def __init__(
        self,
        expected: TeacherInfo,
        *,
        budget: int,
        terminal: TerminalMap,
        connections: int,
        config_key: str = "teacher",
    ) -> None:
        """wanted: what the recipe asks for; its max_tokens is not looked at. budget: tokens of a request, of more than
        one sample. connections: requests that a replica gets at the same time. label: the recipe's key of the teacher.
        """
        self._expected, self._budget, self._terminal = expected, budget, terminal
        self._connections, self._config_key = connections, config_key

    def calls(self, samples: Sequence[Sample], number: str) -> list[tuple[SeparateScoreCall, Sequence[Sample]]]:
        """As `Source.calls`: consecutive samples of at most the budget's tokens together."""
        parts = split_into_micro_batches(samples, self._budget)
        size = self._expected.payload_format.bytes_per_token
        return [(SeparateScoreCall(self._request(part, f"{number}-{i}"), size), part) for i, part in enumerate(parts)]

    def _request(self, samples: Sequence[Sample], name: str) -> ScoreRequest:
        scored = []
        for sample in samples:
            label = self._terminal.terminal_target_id(sample) if self._expected.signal == "topk" else None
            prompt, response = len(sample.prompt.token_ids), len(sample.response_ids)
            scored.append(ScoredSample(prompt, response, -1 if label is None else label))
        ids = [token for sample in samples for token in sample.token_ids]
        return ScoreRequest(name, scored, torch.tensor(ids, dtype=torch.int32))

    def client(self, url: str, key: str | None) -> TeacherClient:
        """As `Source.client`."""
        return TeacherClient(
            url, api_key=key, connections=self._connections, key_setting=f"{self._config_key}.api_key_file"
        )

    async def validate(self, client: TeacherClient, longest: int) -> TokenLimit:
        """As `Source.admit`."""
        if not await client.ready():
            raise Busy("it does not score yet")
        found = await client.info()
        check_same_teacher(
            client.url, found, replace(self._expected, max_tokens=max(longest, self._budget)), self._config_key
        )
        return TokenLimit(found.max_tokens)


def check_same_teacher(url: str, actual: TeacherInfo, expected: TeacherInfo, config_key: str) -> None:
    """Raises UserError, in one line, where a replica is another teacher than the recipe's. wanted.max_tokens: of the
    longest request."""
    topk = expected.signal == "topk"
    for name, key, matters in (
        ("fingerprint", f"{config_key}.model", True),
        ("signal", f"{config_key}.signal", True),
        ("terminal", f"{config_key}.terminal_map", True),
        ("vocab_size", "student.model (vocabulary)", True),
        ("top_k", "objective.top_k", topk),
        ("width", f"{config_key}.model (hidden size)", not topk),
        ("dtype", f"{config_key}.precision", not topk),
    ):
        if matters and getattr(actual, name) != getattr(expected, name):
            raise UserError(
                f"the teacher at {url} has another {key} than this recipe: {_shown(name, actual)} there, "
                f"{_shown(name, expected)} here; "
                "start it again with `eaopd teach` and this recipe"
            )
    if actual.max_tokens < expected.max_tokens:
        raise UserError(
            f"the teacher at {url} takes requests of {actual.max_tokens} tokens, and this recipe's have up to "
            f"{expected.max_tokens} (train.micro_batch_tokens, rollout.max_response_tokens): start it again with "
            "`eaopd teach` and this recipe"
        )


def _shown(name: str, info: TeacherInfo) -> str:
    if name == "fingerprint":
        return f"{info.model} ({info.fingerprint})"
    if name == "terminal":
        kind, student, teacher = info.terminal
        return f"{kind} (student {student}, teacher {teacher})"
    return str(getattr(info, name))
