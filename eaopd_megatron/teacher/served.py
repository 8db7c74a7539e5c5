"""A teacher on an SGLang server: it prefills prompt and response, generates nothing, and returns top-k log-probs.

Ids that tie for the k-th place in a bf16 model may differ from a colocated teacher's: the server breaks those ties.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.data.types import Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.objective import TeacherTopK
from eaopd_megatron.objective.vocab_parallel import top_k_positions
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, verify_server
from eaopd_megatron.rollout.sglang.requests import LengthLimits, checked_meta_info, checking_answer
from eaopd_megatron.serving.http import SGLangClient
from eaopd_megatron.teacher.answer_checks import AnswerFormat
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import TopKPayload

_LOGPROB_TOLERANCE = 1e-3
"""Nats by which rounding may lift a log-prob above 0, or make it differ between two places of an answer."""


class ServedBackend:
    """`ScoringBackend` of SGLang servers that serve a teacher."""

    def __init__(
        self,
        folder: HfFolder,
        *,
        vocab_size: int,
        k: int,
        terminal: TerminalMap,
        connections: int,
        config_key: str = "teacher",
    ) -> None:
        """folder: the teacher's. vocab_size: ids that all models of the run have. k: log-probs per token, at most
        vocab_size. connections: concurrent requests per server. config_key: the teacher's section of the recipe."""
        self.folder, self.terminal, self._connections, self._config_key = folder, terminal, connections, config_key
        self.payload_format, self.vocab_size = TopKPayload(k, has_entropy=False), vocab_size
        # log-probs are normalised over the teacher's own ids, of which those that others lack are removed
        complete = folder.vocab_size <= vocab_size and not terminal.masked_ids
        self.answer_format = AnswerFormat(vocab_size, folder.vocab_size if complete else None)
        # some of the server's top ids may be ones that the other models lack
        self.num_logprobs = k + min(k, max(0, folder.vocab_size - vocab_size) + len(terminal.masked_ids))

    def calls(self, samples: Sequence[Sample], number: str) -> list[tuple[ServedScoreCall, list[Sample]]]:
        """As `ScoringBackend.calls`: one call per sample."""
        return [(ServedScoreCall(f"{number}-{i}", sample, self), [sample]) for i, sample in enumerate(samples)]

    def client(self, url: str, key: str | None) -> SGLangClient:
        setting = f"{self._config_key}.api_key_file"
        return SGLangClient(url, api_key=key, connections=self._connections, key_setting=setting)

    async def validate(self, client: SGLangClient, longest: int) -> LengthLimits:
        return await verify_server(client, ExpectedModel.of(self.folder, longest, role="teacher", scores_only=True))


@dataclass(frozen=True, eq=False)
class ServedScoreCall:
    """One sample as a pool's call. Its answer is [response tokens, bytes_per_token] uint8."""

    id: str
    sample: Sample
    backend: ServedBackend

    def body(self, attempt: int = 0) -> dict[str, Any]:
        """Return the body of POST /generate.

        Distributions start at the prompt's last token, which predicts the first response token; the server may have the
        tokens before it in its cache.
        """
        remapped = self.backend.terminal.remapped_ids(self.sample)
        return {
            "rid": f"{self.id}.{attempt}",
            "input_ids": self.sample.token_ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(self.sample.prompt.token_ids) - 1,
            "top_logprobs_num": self.backend.num_logprobs,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
            **({"token_ids_logprob": remapped} if remapped else {}),
        }

    def validate(self, limits: LengthLimits) -> None:
        """Raise UserError if a server with these limits cannot take the request."""
        if not self.sample.prompt.token_ids:
            raise UserError(f"request {self.id}: prompt {self.sample.prompt.id} has no tokens")
        limits.validate(self.body())

    async def attempt(self, client: SGLangClient, number: int) -> torch.Tensor:
        """Return the payload. Raises UserError for an answer to another request, or one that no healthy model gives."""
        body = self.body(number)
        top_k = self._parse_answer(body, await client.generate(body), client.url)
        return self.backend.payload_format.encode(top_k)

    def _parse_answer(self, body: Mapping[str, Any], answer: Mapping[str, Any], server: str) -> TeacherTopK:
        rid, tokens = body["rid"], torch.tensor(self.sample.response_ids)
        shape = (len(tokens), self.backend.num_logprobs)
        with checking_answer(rid, server):
            meta = checked_meta_info(rid, answer, server)
            logprobs, reported, _ = zip(*meta["input_token_logprobs"], strict=True)
            # the first entry is the prompt's last token's, whose log-prob is not requested
            if list(reported) != self._reported_ids() or meta["input_top_logprobs_null_prefix"] != 1:
                raise UserError(f"{server} answered request {rid} about other tokens than its response's")
            if tuple(meta["input_top_logprobs_shape"]) != shape:
                raise UserError(
                    f"{server} answered request {rid} with log-probs of shape {meta['input_top_logprobs_shape']}; "
                    f"{list(shape)} were requested"
                )
            values = _decode_array(meta, "val", torch.float32, shape)
            ids = _decode_array(meta, "idx", torch.int32, shape).long()
            own = _to_tensor(logprobs[1:], len(tokens))
            remapped = {
                token: _to_tensor([row[place][0] for row in meta["input_token_ids_logprobs"][1:]], len(tokens))
                for place, token in enumerate(body.get("token_ids_logprob", ()))
            }
        top_k = self._to_student_ids(ids, values, own, remapped)
        if not _is_consistent(values, ids, own, tokens) or top_k.token_logprob.isnan().any():
            raise UserError(f"{server} answered request {rid} with invalid log-probs: its weights may hold NaN")
        if top_k.logprobs.isinf().any():
            raise UserError(
                f"{server} answered request {rid} with fewer than {self.backend.payload_format.k} ids that all models "
                f"have among the {self.backend.num_logprobs} most probable ones: lower objective.top_k"
            )
        return top_k

    def _reported_ids(self) -> list[int]:
        """Return the prompt's last token and the response's tokens as the server reports them: 0 stands for the last id
        of its vocabulary."""
        last = self.backend.folder.vocab_size - 1
        tokens = [self.sample.prompt.token_ids[-1], *self.sample.response_ids]
        return [0 if token == last else token for token in tokens]

    def _to_student_ids(
        self, ids: torch.Tensor, values: torch.Tensor, own: torch.Tensor, remapped: Mapping[int, torch.Tensor]
    ) -> TeacherTopK:
        """Apply the terminal map. Ids that other models lack come last, at -inf.

        ids, values [n, num_logprobs]; own [n]: log-probs of the response tokens; remapped: teacher's id → its log-probs
        [n], for response tokens that the map translates.
        """
        terminal, tokens = self.backend.terminal, torch.tensor(self.sample.response_ids)
        ids = terminal.swap_ids(ids)
        foreign = (ids >= self.backend.vocab_size) | torch.isin(ids, torch.tensor(terminal.masked_ids, dtype=ids.dtype))
        values = values.masked_fill(foreign, -torch.inf)
        best = top_k_positions(values, ids, self.backend.payload_format.k)
        targets = terminal.teacher_ids(self.sample)
        for token, logprobs in remapped.items():
            own = torch.where((targets == token) & (targets != tokens), logprobs, own)
        return TeacherTopK(ids.gather(1, best), values.gather(1, best), own)


def _decode_array(meta: Mapping[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """Return a flat array of the answer in this shape. Raises ValueError for another type or size."""
    field = f"input_top_logprobs_{name}_flat_b64"
    array = torch.frombuffer(bytearray(base64.b64decode(meta[field])), dtype=dtype)
    if meta[f"{field}_dtype"] != str(dtype).removeprefix("torch.") or array.numel() != math.prod(shape):
        raise ValueError(f"{list(shape)} {dtype} in {field}")
    return array.view(shape)


def _to_tensor(logprobs: Sequence[float | None], count: int) -> torch.Tensor:
    """Return [count]; None becomes NaN, which JSON lacks. Raises ValueError for another number of them."""
    if len(logprobs) != count:
        raise ValueError(f"{count} log-probs")
    return torch.tensor([math.nan if lp is None else lp for lp in logprobs], dtype=torch.float32)


def _is_consistent(values: torch.Tensor, ids: torch.Tensor, own: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Return whether the log-probs are finite, descending and at most 0, and those of the response tokens [n] are the
    same in both places of the answer."""
    finite = torch.isfinite(values).all() and torch.isfinite(own).all() and (values <= _LOGPROB_TOLERANCE).all()
    descending = (values[:, 1:] <= values[:, :-1]).all()
    same = ((values - own[:, None]).abs() <= _LOGPROB_TOLERANCE) | (ids != tokens[:, None])
    return bool(finite and descending and same.all() and (own <= values[:, 0] + _LOGPROB_TOLERANCE).all())
