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
from eaopd_megatron.teacher.answer_checks import AnswerFormat
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import PayloadFormat
from eaopd_megatron.teacher.protocol import ScoredSample, ScoreRequest, TeacherInfo


class TeacherClient(HttpClient):
    """Client of one `eaopd teach`."""

    key_setting = "teacher.api_key_file"
    max_answer_bytes = 2**20

    async def score(self, body: bytes, size: int) -> torch.Tensor:
        """POST /score; return the answer's `size` bytes [size] uint8.

        Raises ServerGone at once, Busy after `timeouts.attempts`, and UserError for a request that it refuses or an
        answer of another size.
        """
        answer = await self.fetch("POST", "/score", body, seconds=self.timeouts.generate, size=size)
        return torch.frombuffer(answer.content, dtype=torch.uint8)

    async def ready(self) -> bool:
        """Return whether it scores. Raises ServerGone, and UserError for a refusal, such as of the API key: waiting
        would not change it."""
        try:
            await self.fetch("GET", self.ready_path, b"", seconds=self.timeouts.health, attempts=1)
        except Busy:
            return False
        return True

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
    bytes_per_token: int

    @property
    def id(self) -> str:
        return self.request.id

    def validate(self, limits: TokenLimit) -> None:
        """Raise UserError if the request is too long."""
        if (tokens := len(self.request.token_ids)) > limits.max_tokens:
            raise UserError(f"a request of {tokens} tokens is longer than the teacher's {limits.max_tokens}")

    async def attempt(self, client: TeacherClient, number: int) -> torch.Tensor:
        """Return [response tokens, bytes_per_token] uint8. Raises ServerGone, Busy, UserError."""
        count, width = self.request.response_tokens, self.bytes_per_token
        return (await client.score(self.request.encode(), count * width)).view(count, width)


class SeparateBackend:
    """`ScoringBackend` of replicas that were started with `eaopd teach`."""

    def __init__(
        self,
        expected: TeacherInfo,
        *,
        budget: int,
        terminal: TerminalMap,
        connections: int,
        config_key: str = "teacher",
    ) -> None:
        """expected: the teacher that the recipe names; its max_tokens is ignored. budget: tokens of a request of more
        than one sample. connections: concurrent requests per replica. config_key: the teacher's section of the recipe.
        """
        self._expected, self._budget, self.terminal = expected, budget, terminal
        self._connections, self._config_key = connections, config_key

    @property
    def payload_format(self) -> PayloadFormat:
        return self._expected.payload_format

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat(self._expected.vocab_size, self._expected.vocab_size)

    def calls(self, samples: Sequence[Sample], number: str) -> list[tuple[SeparateScoreCall, Sequence[Sample]]]:
        """As `ScoringBackend.calls`: each call has consecutive samples of at most `budget` tokens."""
        width = self.payload_format.bytes_per_token
        return [
            (SeparateScoreCall(self._request(group, f"{number}-{i}"), width), group)
            for i, group in enumerate(split_into_micro_batches(samples, self._budget))
        ]

    def _request(self, samples: Sequence[Sample], request_id: str) -> ScoreRequest:
        scored = []
        for sample in samples:
            target = self.terminal.terminal_target_id(sample) if self._expected.signal == "topk" else None
            prompt, response = len(sample.prompt.token_ids), len(sample.response_ids)
            scored.append(ScoredSample(prompt, response, -1 if target is None else target))
        ids = [token for sample in samples for token in sample.token_ids]
        return ScoreRequest(request_id, scored, torch.tensor(ids, dtype=torch.int32))

    def client(self, url: str, key: str | None) -> TeacherClient:
        setting = f"{self._config_key}.api_key_file"
        return TeacherClient(url, api_key=key, connections=self._connections, key_setting=setting)

    async def validate(self, client: TeacherClient, longest: int) -> TokenLimit:
        if not await client.ready():
            raise Busy("it is not ready to score yet")
        actual = await client.info()
        expected = replace(self._expected, max_tokens=max(longest, self._budget))
        check_same_teacher(client.url, actual, expected, self._config_key)
        return TokenLimit(actual.max_tokens)


def check_same_teacher(url: str, actual: TeacherInfo, expected: TeacherInfo, config_key: str) -> None:
    """Raise UserError, in one line, if a replica is another teacher than the recipe's, or its requests are shorter than
    expected.max_tokens."""
    topk = expected.signal == "topk"
    for name, key, relevant in (
        ("fingerprint", f"{config_key}.model", True),
        ("signal", f"{config_key}.signal", True),
        ("terminal", f"{config_key}.terminal_map", True),
        ("vocab_size", "student.model (vocabulary)", True),
        ("masked_ids", f"{config_key}.tokenizer_check", True),
        ("top_k", "objective.top_k", topk),
        ("width", f"{config_key}.model (hidden size)", not topk),
        ("dtype", f"{config_key}.precision", not topk),
    ):
        if relevant and getattr(actual, name) != getattr(expected, name):
            raise UserError(
                f"the teacher at {url} has another {key} than this recipe: {_shown(name, actual)} there, "
                f"{_shown(name, expected)} here; start it again with `eaopd teach` and this recipe"
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
