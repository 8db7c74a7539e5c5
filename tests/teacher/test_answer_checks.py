"""A lying teacher: each answer that no model gives is refused in one line, and no honest one is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import ServiceUnavailable
from eaopd_megatron.objective import TeacherTopK, summarise_teacher
from eaopd_megatron.teacher.answer_checks import AnswerFormat, find_contradiction
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import ScoreRequest
from eaopd_megatron.teacher.remote import RemoteTeacher
from eaopd_megatron.teacher.separate import SeparateBackend
from tests.teacher.scoring_double import INFO, ScoringDouble, running

VOCAB, K, ROWS = 112, 8, 64
Lie = Callable[[TeacherTopK], TeacherTopK]


def honest(
    vocab: int = VOCAB, k: int = K, *, scale: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[TeacherTopK, torch.Tensor]:
    """A teacher's answer about ids drawn from it and from anywhere, and those ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(ROWS, vocab, generator=generator)).to(dtype)
    likely = torch.multinomial(logits.float().softmax(1), 1, generator=generator)[:, 0]
    tokens = torch.where(torch.arange(ROWS) % 2 == 0, likely, torch.randint(vocab, (ROWS,), generator=generator))
    return summarise_teacher(logits, tokens, k=k, vocab_size=vocab), tokens


def roll(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None
    return values.roll(1, 0)


def one(values: torch.Tensor | None, value: float, row: int = 5) -> torch.Tensor:
    assert values is not None
    changed = values.clone()
    changed[row] = value
    return changed


def mapped(ids: torch.Tensor) -> torch.Tensor:
    return (ids * 5 + 3) % VOCAB


LIES: dict[str, Lie] = {
    "ids permuted against log-probs": lambda t: replace(t, ids=t.ids.flip(1)),
    "ids rolled by one place": lambda t: replace(t, ids=t.ids.roll(1, 1)),
    "ids of another tokenizer": lambda t: replace(t, ids=mapped(t.ids)),
    "ids one higher": lambda t: replace(t, ids=(t.ids + 1) % VOCAB),
    "rows of the token before": lambda t: TeacherTopK(*map(roll, (t.ids, t.logprobs, t.token_logprob, t.entropy))),
    "ids of the token before": lambda t: replace(t, ids=roll(t.ids)),
    "log-probs of the token before": lambda t: replace(t, logprobs=roll(t.logprobs)),
    "log p(y) of the token before": lambda t: replace(t, token_logprob=roll(t.token_logprob)),
    "entropies of the token before": lambda t: replace(t, entropy=roll(t.entropy)),
    "log p(y) 3 nats lower": lambda t: replace(t, token_logprob=t.token_logprob - 3),
    "log p(y) 3 nats higher": lambda t: replace(t, token_logprob=t.token_logprob + 3),
    "log p(y) in bits": lambda t: replace(t, token_logprob=t.token_logprob / math.log(2)),
    "log p(y) of 0": lambda t: replace(t, token_logprob=torch.zeros_like(t.token_logprob)),
    "log p(y) not finite": lambda t: replace(t, token_logprob=one(t.token_logprob, -math.inf)),
    "an entropy of 1e30": lambda t: replace(t, entropy=one(t.entropy, 1e30)),
    "an entropy of 0": lambda t: replace(t, entropy=torch.zeros_like(t.logprobs[:, 0])),
    "a negative entropy": lambda t: replace(t, entropy=one(t.entropy, -1)),
    "an entropy of ln V": lambda t: replace(t, entropy=torch.full_like(t.logprobs[:, 0], math.log(VOCAB))),
    "entropy NaN": lambda t: replace(t, entropy=one(t.entropy, math.nan)),
    "log-probs NaN": lambda t: replace(t, logprobs=one(t.logprobs, math.nan)),
    "log-probs of temperature 2": lambda t: replace(t, logprobs=t.logprobs / 2, token_logprob=t.token_logprob / 2),
    "log-probs of the k alone": lambda t: replace(t, logprobs=t.logprobs.log_softmax(1)),
    "an id twice": lambda t: replace(t, ids=torch.cat([t.ids[:, :-1], t.ids[:, :1]], 1)),
    "an id of another vocabulary": lambda t: replace(t, ids=one(t.ids, VOCAB)),
    "least likely first": lambda t: replace(t, ids=t.ids.flip(1), logprobs=t.logprobs.flip(1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_teacher_is_believed(lie: str) -> None:
    top_k, tokens = honest()
    found = find_contradiction(LIES[lie](top_k), tokens, AnswerFormat(VOCAB, VOCAB))
    assert found is not None, lie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "k"), [(112, 1), (112, 112), (5000, 16), (151_936, 16)])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0, 60.0])
def test_an_honest_teacher_is_refused(dtype: torch.dtype, vocab: int, k: int, scale: float) -> None:
    top_k, tokens = honest(vocab, k, scale=scale, dtype=dtype)
    for answer in (AnswerFormat(vocab, vocab), AnswerFormat(vocab, None)):
        assert find_contradiction(top_k, tokens, answer) is None
        assert find_contradiction(replace(top_k, entropy=None), tokens, answer) is None


class LyingDouble(ScoringDouble):
    """Answers as a model would, but for a lie about the second sample."""

    lie: Lie = staticmethod(lambda top_k: top_k)

    def score(self, request: ScoreRequest) -> torch.Tensor:
        tokens, start = [], 0
        for sample in request.samples:
            tokens.append(request.token_ids[start + sample.prompt : start + sample.prompt + sample.response].long())
            start += sample.prompt + sample.response
        y = torch.cat(tokens)
        logits = 3 * torch.randn(len(y), VOCAB, generator=torch.Generator().manual_seed(int(y.sum())))
        return self.info.payload_format.encode(
            type(self).lie(summarise_teacher(logits, y, k=K, vocab_size=VOCAB))  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (None, ""),
        (
            lambda t: replace(t, entropy=one(t.entropy, 1e30, 4)),
            "prompt 1, response token 1 .* entropy is above ln",
        ),
        (
            lambda t: replace(t, token_logprob=one(t.token_logprob, 0.0, 2)),
            r"prompt 0, response token 2 \(id 0\), cannot be a model's: .*p\(y\)",
        ),
    ],
)
def test_a_lie_over_the_wire_is_one_line_with_prompt_and_row(tmp_path: Path, lie: Lie | None, message: str) -> None:
    info = replace(INFO, signal="topk", top_k=K, vocab_size=VOCAB)
    double = LyingDouble(info)
    LyingDouble.lie = staticmethod(lie or (lambda top_k: top_k))  # type: ignore[assignment]
    samples = [Sample(Prompt(str(i), (1, 2), {}), [i] * 3, "stop", [0.0] * 3, 0, i) for i in range(2)]
    parallel = cast(ParallelState, Alone())
    with running(double):
        teacher = RemoteTeacher(
            parallel,
            SeparateBackend(info, budget=64, terminal=TerminalMap("none", -1, -1), connections=2),
            TeacherConfig(model="unused", placement="separate", urls=[double.url]),
            failures=tmp_path / "failures",
            stop_signal=lambda: 0,
            report=print,
        )
        teacher.start(16)
        teacher.open()
        try:
            teacher.submit(samples)
            if lie is None:
                assert [len(cast(TeacherTopK, s.teacher_top_k).ids) for s in teacher.wait(samples)] == [3, 3]
                return
            with pytest.raises(ServiceUnavailable, match=message) as caught:
                teacher.wait(samples)
        finally:
            teacher.close()
    assert "\n" not in str(caught.value) and double.url in str(caught.value)
    (saved,) = (tmp_path / "failures").glob("teacher_answer_*.json")
    record = json.loads(saved.read_text())
    assert str(saved) in str(caught.value) and f"prompt {record['prompt_id']}" in str(caught.value)
    assert record["why"] in str(caught.value)


class Alone:
    """A run of one rank, without process groups."""

    rank, world_size, tp_size, tp_rank, tp_cp_size, tp_cp_rank = 0, 1, 1, 0, 1, 0
    is_main = is_last_stage = True
    device = torch.device("cpu")
