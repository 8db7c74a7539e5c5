"""Checks of test_service.py: payloads of the service's ranks against transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.megatron.model import build_model
from eaopd_megatron.teacher.payload import HiddenStatePayload, TopKPayload
from eaopd_megatron.teacher.protocol import ScoredSample, ScoreRequest
from eaopd_megatron.teacher.service.run import TeacherScorer
from tests.distributed.groups import model_parallel

TOP_K = 5


def check_rows(
    group: dist.ProcessGroup, folder: str, values: str, layout: dict[str, Any], swap: tuple[int, int], vocab_size: int
) -> None:
    """values: file of tokens [b, s], hidden [b, s, h] and logits [b, s, V], the latter without a map. Each sequence is
    a sample with a prompt of another length. The first sample's last response token is looked up under id 1."""
    source = HfFolder.open(folder)
    expected = load_file(values)
    tokens = expected["tokens"]
    samples = [ScoredSample(2 + i, tokens.shape[1] - 2 - i, 1 if i == 0 else -1) for i in range(len(tokens))]
    whole = ScoreRequest("whole", samples, tokens.int().flatten())
    alone = ScoreRequest("alone", samples[:1], tokens[0].int())
    prompt_only = ScoreRequest("prompt", [ScoredSample(3, 0)], tokens[0, :3].int())
    with model_parallel(ParallelLayout(**layout)) as parallel:
        model = build_model(source.config, parallel.layout, torch.float32, untie=True)
        load_hf(model, source, parallel, row_map={swap[0]: swap[1]})
        for payload_format in (HiddenStatePayload(source.config.hidden_size, torch.float32), TopKPayload(TOP_K)):
            scorer = TeacherScorer(model, parallel, payload_format, vocab_size=vocab_size)
            together = scorer.score([alone, prompt_only, whole])
            single = scorer.score([whole])
            if not parallel.is_main:
                continue
            assert [len(answer) for answer in together] == [alone.response_tokens, 0, whole.response_tokens]
            assert torch.equal(together[2], single[0]), "other requests change an answer"
            for request, answer in ((alone, together[0]), (whole, together[2])):
                places = [slice(s.prompt - 1, s.prompt + s.response - 1) for s in request.samples]
                if isinstance(payload_format, HiddenStatePayload):
                    hidden = torch.cat([expected["hidden"][i, place] for i, place in enumerate(places)])
                    torch.testing.assert_close(payload_format.decode(answer), hidden, rtol=1e-4, atol=1e-5)
                    continue
                logits = torch.cat([expected["logits"][i, place] for i, place in enumerate(places)])
                logits[:, list(swap)] = logits[:, list(swap[::-1])]
                targets = torch.cat([tokens[i, s.prompt :] for i, s in enumerate(request.samples)])
                targets[request.samples[0].response - 1] = 1
                _compare(payload_format, answer, logits[:, :vocab_size].log_softmax(-1), targets)


def _compare(payload_format: TopKPayload, answer: torch.Tensor, logprobs: torch.Tensor, targets: torch.Tensor) -> None:
    top_k, best = payload_format.decode(answer), logprobs.topk(TOP_K)
    assert torch.equal(top_k.ids, best.indices)
    assert top_k.entropy is not None
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(top_k.logprobs, best.values)
    close(top_k.token_logprob, logprobs.gather(1, targets[:, None])[:, 0])
    close(top_k.entropy, -(logprobs.exp() * logprobs).sum(1))
