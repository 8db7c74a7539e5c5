"""Rollouts in process: generation with the training model itself, at any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from eaopd_megatron.data.prompts import seeded_uniforms
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.distributed.broadcast import wait_on_all_ranks
from eaopd_megatron.distributed.parallel_state import ParallelState, gather_objects
from eaopd_megatron.megatron.generation import Decoder, decode_mode
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.pipeline import broadcast_from_last_stage
from eaopd_megatron.rollout.interface import GenerationRequest, RolloutEngine, RolloutHandle, SamplingKey

_SIGNAL_INTERVAL = 16
"""Positions after which ranks that decode in step ask each other whether one of them got a stop signal."""


def sample_tokens(logprobs: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Sample token ids [b] from log-probs [b, V] (nats, normalised) by inverse CDF with uniform [b] fp64 in [0, 1).

    top_p keeps the smallest set of most probable tokens whose probability reaches it. temperature 0 is greedy. Sums are
    fp64: over 151,936 tokens an fp32 cumulative sum would misplace the distribution's last digits.
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    probs = torch.softmax(logprobs.double() / temperature, -1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    cumulative = probs.cumsum(-1)
    target = uniform.to(probs.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # rounding at the very top must not draw a token of probability zero
    last_possible = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(tokens, last_possible)


class LocalRollout(RolloutEngine):
    """Generates with this data-parallel rank's model. All ranks of a model's copy call it with the same prompts.

    stop_signal: returns the number of a received signal that asks the run to stop, or 0. masked_ids: never sampled.
    """

    def __init__(
        self,
        model: ModelChunks,
        parallel: ParallelState,
        *,
        vocab_size: int,
        batch_size: int,
        stop_signal: Callable[[], int] = lambda: 0,
        masked_ids: Sequence[int] = (),
    ) -> None:
        self.model, self.parallel = model, parallel
        masked = [token for token in masked_ids if token < vocab_size]  # another teacher's vocabulary may be smaller
        self._masked_ids = torch.tensor(masked, dtype=torch.long, device=parallel.device)
        self.vocab_size, self.batch_size, self.stop_signal = vocab_size, batch_size, stop_signal
        self._version = 0

    def update_weights(self, version: int) -> None:
        """Note the version: the model that generates is the one that is trained."""
        self._version = version

    def submit(self, request: GenerationRequest) -> RolloutHandle:
        """Return a handle; `collect` generates."""
        return RolloutHandle(request)

    def collect(self, handle: RolloutHandle) -> Iterator[list[Sample]]:
        """Generate all of this rank's responses and yield them as one part.

        Raises StopRequested on all ranks if one got a signal; the model is as before.
        """
        request, local = handle.request, handle.request.local_indices
        prompts, keys = [request.prompts[i] for i in local], [request.sampling_keys[i] for i in local]
        samples = self.generate(prompts, keys, request.sampling, self._version)
        wait_on_all_ranks(self.parallel, lambda: True, self.stop_signal)
        yield [replace(sample, index=index) for index, sample in zip(local, samples, strict=True)]

    def generate(
        self, prompts: Sequence[Prompt], keys: Sequence[SamplingKey], sampling: SamplingParams, version: int
    ) -> list[Sample]:
        """Return one sample per prompt, in order, or none if a signal came meanwhile. keys: one RNG key per sample.

        Context-parallel ranks divide the prompts and exchange their samples. Ranks that share experts decode in step
        until the last of them is done.
        """
        own = range(self.parallel.cp_rank, len(prompts), self.parallel.cp_size)
        # longest prompts first, for little padding; random numbers belong to samples, so the order changes nothing else
        order = sorted(own, key=lambda i: -len(prompts[i].token_ids))
        samples: dict[int, Sample] = {}
        with decode_mode(self.model):
            for start in range(0, self._max_over_expert_ranks(len(order)), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = self._batch([prompts[i] for i in chosen], [keys[i] for i in chosen], sampling, version)
                if batch is None:
                    break
                samples.update(zip(chosen, batch, strict=True))
        gathered = gather_objects(samples, self.parallel.cp_size, self.parallel.cp_group)
        by_index = {i: sample for part in gathered for i, sample in part.items()}
        return [by_index[i] for i in range(len(prompts))] if len(by_index) == len(prompts) else []

    def _batch(
        self, prompts: Sequence[Prompt], keys: Sequence[SamplingKey], sampling: SamplingParams, version: int
    ) -> list[Sample] | None:
        """Return the samples of one batch; None if a signal came meanwhile.

        Without prompts this rank decodes a dummy token as long as the others.
        """
        device = self.parallel.device
        texts = [list(p.token_ids) for p in prompts] or [[0]]
        noise = torch.stack([seeded_uniforms(sampling.max_new_tokens, *key) for key in keys or [("idle",)]])
        decoder = Decoder(self.model, texts, sampling.max_new_tokens, self.parallel)
        stops = torch.tensor(sampling.stop_token_ids, device=device)
        running = torch.full((len(texts),), bool(prompts), device=device)
        tokens, logprobs = [], []
        logits = decoder.prefill()
        for position in range(sampling.max_new_tokens):
            if position % _SIGNAL_INTERVAL == 0 and self._stopped():
                return None
            token, logprob = self._draw(logits, noise[:, position], sampling)
            tokens.append(token)
            logprobs.append(logprob)
            running &= ~torch.isin(token, stops)
            if position + 1 == sampling.max_new_tokens or not self._max_over_expert_ranks(int(running.any())):
                break
            logits = decoder.step(token)
        ids = torch.stack(tokens, 1).tolist()
        values = broadcast_from_last_stage(torch.stack(logprobs, 1), self.parallel).tolist()
        return [
            _sample(prompt, row, value, sampling, version)
            for prompt, row, value in zip(prompts, ids, values, strict=bool(prompts))
        ]

    def _draw(
        self, logits: torch.Tensor | None, noise: torch.Tensor, sampling: SamplingParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [b], the same on every rank of the model's copy, and their log-probs [b] on the last stage."""
        if logits is None:
            token = torch.empty(len(noise), dtype=torch.long, device=self.parallel.device)
            return broadcast_from_last_stage(token, self.parallel), torch.empty(len(noise), device=self.parallel.device)
        logits = logits[:, : self.vocab_size].float()
        if len(self._masked_ids):
            logits = logits.index_fill(1, self._masked_ids, -torch.inf)
        policy = torch.log_softmax(logits, -1)
        token = sample_tokens(policy, noise, temperature=sampling.temperature, top_p=sampling.top_p)
        if self.parallel.tp_size > 1:  # shards that decode different tokens would corrupt each other
            dist.broadcast(token, self.parallel.tp_src_rank(), group=self.parallel.tp_group)
        return broadcast_from_last_stage(token, self.parallel), policy.gather(-1, token[:, None]).squeeze(-1)

    def _stopped(self) -> bool:
        """Return whether this rank, or one that decodes in step with it, got a signal. Collective over those ranks."""
        parallel, number = self.parallel, int(self.stop_signal())
        if parallel.tp_size * parallel.pp_size > 1:
            flag = torch.tensor(number, device=parallel.device)
            for size, group in ((parallel.tp_size, parallel.tp_group), (parallel.pp_size, parallel.pp_group)):
                if size > 1:
                    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            number = int(flag)
        return self._max_over_expert_ranks(number) > 0

    def _max_over_expert_ranks(self, count: int) -> int:
        """Return the largest count among the ranks that share experts, whose layers exchange tokens."""
        if self.parallel.ep_size * self.parallel.layout.expert_tensor_parallel == 1:
            return count
        most = torch.tensor(count, device=self.parallel.device)
        for group in (self.parallel.ep_group, self.parallel.etp_group):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return int(most)


def _sample(prompt: Prompt, ids: list[int], logprobs: list[float], sampling: SamplingParams, version: int) -> Sample:
    length = next((i + 1 for i, token in enumerate(ids) if token in sampling.stop_token_ids), None)
    reason = "length" if length is None else "stop"
    return Sample(prompt, ids[:length], reason, logprobs[:length], version)
