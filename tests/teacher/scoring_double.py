"""A double of a separate teacher: `teacher/protocol.py` over HTTP, with scores by transformers in one process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eaopd_megatron.objective import summarise_teacher
from eaopd_megatron.serving.http import EventLoopThread
from eaopd_megatron.teacher.payload import HiddenStatePayload
from eaopd_megatron.teacher.protocol import ScoreRequest, TeacherInfo
from tools.sglang_double.plain_http import Died, PlainServer, Refused


@dataclass
class Faults:
    """Faults of a replica. deaths: requests in which it dies, with all its connections. busy: answers with 429."""

    deaths: int = 0
    returns: bool = True  # restarts after a death, on the same port
    busy: int = 0
    short: bool = False  # a row fewer than tokens
    loading: bool = False


class ScoringDouble(PlainServer):
    """model: a transformers model; None: every byte of an answer is the token's id."""

    def __init__(self, info: TeacherInfo, model: Any = None, *, key: str | None = None, port: int = 0) -> None:
        super().__init__(port)
        self.info, self.model, self.key = info, model, key
        self.faults, self.answered, self.began = Faults(), Counter[str](), asyncio.Event()
        self.released = asyncio.Event()
        self.released.set()

    async def die(self) -> None:
        await super().die()
        if self.faults.returns:
            await self.start()

    async def answer(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Any:
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            raise Refused(401, {"error": "the API key is missing or wrong"})
        if path == "/ready":
            if self.faults.loading:
                raise Refused(503, {"error": "loading"})
            return {}
        if path == "/info":
            return self.info.to_json()
        request = ScoreRequest.decode(raw)
        self.began.set()
        if self.faults.deaths:
            self.faults.deaths -= 1
            raise Died
        if self.faults.busy:
            self.faults.busy -= 1
            raise Refused(429, {"error": "too many requests are in progress"})
        await self.released.wait()
        rows = self.score(request)[int(self.faults.short) :]
        self.answered[request.id] += 1
        return rows.numpy().tobytes()

    @torch.no_grad()
    def score(self, request: ScoreRequest) -> torch.Tensor:
        """Return the payload [response tokens, bytes_per_token]."""
        payloads, start = [], 0
        for sample in request.samples:
            ids = request.token_ids[start : start + sample.prompt + sample.response].long()
            payloads.append(self._rows(ids, sample.prompt, sample.target_id))
            start += len(ids)
        return torch.cat(payloads)

    def _rows(self, ids: torch.Tensor, prompt: int, target_id: int) -> torch.Tensor:
        payload_format, tokens = self.info.payload_format, ids[prompt:]
        if self.model is None:
            return (tokens % 256).to(torch.uint8)[:, None].expand(-1, payload_format.bytes_per_token)
        hidden = self.model.model(ids[None]).last_hidden_state[0, prompt - 1 : -1]
        if isinstance(payload_format, HiddenStatePayload):
            return payload_format.encode(hidden)
        targets = tokens.clone()
        if target_id >= 0:
            targets[-1] = target_id
        kind, *both = self.info.terminal
        head = self.model.lm_head.weight.clone()
        if kind == "swap":
            head[both] = head[both[::-1]]
        logits, size = hidden @ head.T, self.info.vocab_size
        top_k = summarise_teacher(logits[:, :size], tokens, k=payload_format.k, vocab_size=size, teacher_tokens=targets)
        return payload_format.encode(top_k)


@contextmanager
def running(*doubles: ScoringDouble) -> Iterator[EventLoopThread]:
    """Run the doubles in a thread."""
    with EventLoopThread("doubles") as loop:
        for double in doubles:
            loop.run(double.start())
        try:
            yield loop
        finally:
            for double in doubles:
                double.faults.returns = False
                loop.run(double.die())


INFO = TeacherInfo("tiny", "f00d", "hidden", 0, 2, "bf16", 112, ("none", -1, -1), 64, "TP1")
