"""A teacher that an SGLang server holds: prompt and response go in, nothing is written, top-k log-probs come back.

Of a bf16 model, ids of equal log-prob beyond the k-th place may be others than a colocated teacher's: the server draws
that line.
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
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import TopKPayload

_LOGPROB_TOLERANCE = 1e-3
"""Nats by which rounding may lift a log-prob above 0, or move it between two places of an answer."""


class ServedBackend:
    """What `RemoteTeacher` needs of SGLang servers that hold a teacher."""

    def __init__(
        self,
        folder: HfFolder,
        *,
        vocab_size: int,
        k: int,
        terminal: TerminalMap,
        max_running: int,
        config_key: str = "teacher",
    ) -> None:
        """folder: the teacher's. vocab_size: ids that all models of the run have. k: log-probs a token, no more than
        that. max_running: requests on a server at the same time. label: the recipe's key of the teacher."""
        self.folder, self.terminal, self.max_running, self._config_key = folder, terminal, max_running, config_key
        self.payload_format, self.vocab_size = TopKPayload(k, has_entropy=False), vocab_size
        self.num_logprobs = k + min(k, max(0, folder.vocab_size - vocab_size))  # some are ids that the others lack

    def calls(self, samples: Sequence[Sample], number: str) -> list[tuple[ServedScoreCall, list[Sample]]]:
        """As `remote.Source.calls`: one a sample."""
        return [(ServedScoreCall(f"{number}-{i}", sample, self), [sample]) for i, sample in enumerate(samples)]

    def client(self, url: str, key: str | None) -> SGLangClient:
        """As `remote.Source.client`."""
        return SGLangClient(
            url, api_key=key, connections=self.max_running, key_setting=f"{self._config_key}.api_key_file"
        )

    async def validate(self, client: SGLangClient, longest: int) -> LengthLimits:
        """As `remote.Source.admit`."""
        return await verify_server(client, ExpectedModel.of(self.folder, longest, role="teacher", scores_only=True))


@dataclass(frozen=True, eq=False)
class ServedScoreCall:
    """One sample as a pool's call. Its answer is [response tokens, rows.bytes] uint8."""

    id: str
    sample: Sample
    backend: ServedBackend

    def body(self, attempt: int = 0) -> dict[str, Any]:
        """The body of POST /generate. Distributions come from the prompt's last token on, which predicts the first of
        the response; what is before it the server may have in its cache."""
        lacking = self.backend.terminal.remapped_ids(self.sample)
        return {
            "rid": f"{self.id}.{attempt}",
            "input_ids": self.sample.token_ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(self.sample.prompt.token_ids) - 1,
            "top_logprobs_num": self.backend.num_logprobs,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
            **({"token_ids_logprob": lacking} if lacking else {}),
        }

    def validate(self, limits: LengthLimits) -> None:
        """Raises UserError."""
        if not self.sample.prompt.token_ids:
            raise UserError(f"request {self.id}: prompt {self.sample.prompt.id} has no tokens")
        limits.validate(self.body())

    async def attempt(self, client: SGLangClient, number: int) -> torch.Tensor:
        """Raises UserError for an answer that is not one to this request, or that no healthy model gives."""
        body = self.body(number)
        return self.backend.payload_format.encode(self._parse_answer(body, await client.generate(body), client.url))

    def _parse_answer(self, body: Mapping[str, Any], answer: Mapping[str, Any], server: str) -> TeacherTopK:
        rid, tokens = body["rid"], torch.tensor(self.sample.response_ids)
        shape = (len(tokens), self.backend.num_logprobs)
        with checking_answer(rid, server):
            meta = checked_meta_info(rid, answer, server)
            logprobs, named, _ = zip(*meta["input_token_logprobs"], strict=True)
            # the first entry is of the prompt's last token, of which nothing is asked
            if list(named) != self._reported_ids() or meta["input_top_logprobs_null_prefix"] != 1:
                raise UserError(f"{server} answered request {rid} about other tokens than its response's")
            if tuple(meta["input_top_logprobs_shape"]) != shape:
                raise UserError(
                    f"{server} answered request {rid} with log-probs of shape {meta['input_top_logprobs_shape']}; "
                    f"{list(shape)} were asked for"
                )
            values = _decode_array(meta, "val", torch.float32, shape)
            ids = _decode_array(meta, "idx", torch.int32, shape).long()
            own = _to_tensor(logprobs[1:], len(tokens))
            elsewhere = {
                token: _to_tensor([row[place][0] for row in meta["input_token_ids_logprobs"][1:]], len(tokens))
                for place, token in enumerate(body.get("token_ids_logprob", ()))
            }
        said = self._to_student_ids(ids, values, own, elsewhere)
        if not _is_consistent(values, ids, own, tokens) or said.token_logprob.isnan().any():
            raise UserError(f"{server} answered request {rid} with log-probs that are none: its weights may hold NaN")
        if said.logprobs.isinf().any():
            k = self.backend.payload_format.k
            raise UserError(
                f"{server} answered request {rid} with fewer than {k} ids of the student's among the "
                f"{self.backend.num_logprobs} most probable ones: lower objective.top_k"
            )
        return said

    def _reported_ids(self) -> list[int]:
        """The prompt's last token and the response's, as the server names them: 0 for the last of its vocabulary."""
        last = self.backend.folder.vocab_size - 1
        tokens = [self.sample.prompt.token_ids[-1], *self.sample.response_ids]
        return [0 if token == last else token for token in tokens]

    def _to_student_ids(
        self, ids: torch.Tensor, values: torch.Tensor, own: torch.Tensor, elsewhere: Mapping[int, torch.Tensor]
    ) -> TeacherTopK:
        """Under the terminal map; ids that the student lacks come last, at -inf. elsewhere: teacher's id → its log-prob
        [n], for tokens whose own is not the one that is meant."""
        ids = self.backend.terminal.swap_ids(ids)
        values = values.masked_fill(ids >= self.backend.vocab_size, -torch.inf)
        best = top_k_positions(values, ids, self.backend.payload_format.k)
        asked, tokens = self.backend.terminal.teacher_ids(self.sample), torch.tensor(self.sample.response_ids)
        for token, logprobs in elsewhere.items():
            own = torch.where((asked == token) & (asked != tokens), logprobs, own)
        return TeacherTopK(ids.gather(1, best), values.gather(1, best), own)


def _decode_array(meta: Mapping[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """A flat array of the answer. Raises ValueError for one of another type or size."""
    field = f"input_top_logprobs_{name}_flat_b64"
    array = torch.frombuffer(bytearray(base64.b64decode(meta[field])), dtype=dtype)
    if meta[f"{field}_dtype"] != str(dtype).removeprefix("torch.") or array.numel() != math.prod(shape):
        raise ValueError(f"{list(shape)} {dtype} in {field}")
    return array.view(shape)


def _to_tensor(logprobs: Sequence[float | None], count: int) -> torch.Tensor:
    """[count]; what has no number, as JSON has no NaN, is NaN. Raises ValueError for more or fewer."""
    if len(logprobs) != count:
        raise ValueError(f"{count} log-probs")
    return torch.tensor([math.nan if lp is None else lp for lp in logprobs], dtype=torch.float32)


def _is_consistent(values: torch.Tensor, ids: torch.Tensor, own: torch.Tensor, tokens: torch.Tensor) -> bool:
    """Whether they are finite log-probs, best first, and those of the tokens [n] are the same in both places."""
    numbers = torch.isfinite(values).all() and torch.isfinite(own).all() and (values <= _LOGPROB_TOLERANCE).all()
    ordered = (values[:, 1:] <= values[:, :-1]).all()
    same = ((values - own[:, None]).abs() <= _LOGPROB_TOLERANCE) | (ids != tokens[:, None])
    return bool(numbers and ordered and same.all() and (own <= values[:, 0] + _LOGPROB_TOLERANCE).all())
