"""Rollouts in process: generation on the training model itself, at any tensor-parallel size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from eaopd_megatron.data.random import uniforms
from eaopd_megatron.data.samples import Prompt, Sample, Sampling
from eaopd_megatron.megatron.generation import Decoder
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.rollout.sampling import draw


class LocalRollout:
    """Generates on this data-parallel rank's model. All tensor-parallel ranks call it with the same prompts."""

    def __init__(self, model: ModelChunks, parallel: Parallel, *, vocab_size: int, batch_size: int) -> None:
        self.model, self.parallel = model, parallel
        self.vocab_size, self.batch_size = vocab_size, batch_size

    def generate(
        self, prompts: Sequence[Prompt], keys: Sequence[tuple[int | str, ...]], sampling: Sampling, version: int
    ) -> list[Sample]:
        """One sample a prompt, in order. keys: what each sample's random numbers are a function of (`data.random`)."""
        # longest prompts first keeps padding low; random numbers belong to samples, so the order changes nothing else
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
        samples: dict[int, Sample] = {}
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = self._batch([prompts[i] for i in chosen], [keys[i] for i in chosen], sampling, version)
                samples.update(zip(chosen, batch, strict=True))
        finally:
            self.model.train(training)
        return [samples[i] for i in range(len(prompts))]

    def _batch(
        self, prompts: Sequence[Prompt], keys: Sequence[tuple[int | str, ...]], sampling: Sampling, version: int
    ) -> list[Sample]:
        device = self.parallel.device
        noise = torch.stack([uniforms(sampling.max_new_tokens, *key) for key in keys])
        decoder = Decoder(self.model, [list(p.token_ids) for p in prompts], sampling.max_new_tokens, device)
        stops = torch.tensor(sampling.stop_ids, device=device)
        running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        tokens, logprobs = [], []
        logits = decoder.prefill()
        for position in range(sampling.max_new_tokens):
            policy = torch.log_softmax(logits[:, : self.vocab_size].float(), -1)
            token = self._agree(
                draw(policy, noise[:, position], temperature=sampling.temperature, top_p=sampling.top_p)
            )
            tokens.append(token)
            logprobs.append(policy.gather(-1, token[:, None]).squeeze(-1))
            running &= ~torch.isin(token, stops)
            if position + 1 == sampling.max_new_tokens or not running.any():
                break
            logits = decoder.step(token)
        ids = torch.stack(tokens, 1).tolist()
        values = torch.stack(logprobs, 1).tolist()
        return [
            _sample(prompt, row, value, sampling, version)
            for prompt, row, value in zip(prompts, ids, values, strict=True)
        ]

    def _agree(self, token: torch.Tensor) -> torch.Tensor:
        """The first tensor-parallel rank's draw reaches the others: different tokens on different shards would
        corrupt both."""
        if self.parallel.tp_size > 1:
            dist.broadcast(token, self.parallel.tp_source(), group=self.parallel.tp_group)
        return token


def _sample(prompt: Prompt, ids: list[int], logprobs: list[float], sampling: Sampling, version: int) -> Sample:
    length = next((i + 1 for i, token in enumerate(ids) if token in sampling.stop_ids), None)
    reason = "length" if length is None else "stop"
    return Sample(prompt, ids[:length], reason, logprobs[:length], version)
