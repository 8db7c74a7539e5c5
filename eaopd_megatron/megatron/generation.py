"""Token-by-token decoding on GPTModel with Megatron-Core's key-value cache, across pipeline stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel

from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.model import ModelChunks


class Decoder:
    """Decode a batch of prompts of unequal lengths, padded on the left (rotary embeddings depend on distances only).

    All pipeline and tensor-parallel ranks hold the same prompts; context-parallel ranks may hold different ones. Use it
    inside `decode_mode(model)`.
    """

    def __init__(
        self, model: ModelChunks, prompts: list[list[int]], max_new_tokens: int, parallel: ParallelState
    ) -> None:
        longest = max(len(p) for p in prompts)
        self.model, self.parallel = model, parallel
        self.context = StaticInferenceContext(len(prompts), longest + max_new_tokens)
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=parallel.device)
        for row, prompt in zip(self.ids, prompts, strict=True):
            row[longest - len(prompt) :] = torch.tensor(prompt, device=parallel.device)
        padding = torch.tensor([longest - len(p) for p in prompts], device=parallel.device)
        # [b, longest + max_new_tokens], True at padding
        self.is_padding = torch.arange(longest + max_new_tokens, device=parallel.device)[None] < padding[:, None]
        self.has_padding = bool(self.is_padding.any())

    def prefill(self) -> torch.Tensor | None:
        """Return the logits [b, padded vocab] after the prompts, on every TP rank of the last stage; elsewhere None."""
        mask = None
        if self.has_padding:
            length = self.ids.shape[1]
            future = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).triu(1)
            mask = future | self.is_padding[:, None, None, :length]
            # padding attends to itself: a fully masked row would be NaN and reach other positions through its value
            mask = mask & ~torch.eye(length, dtype=torch.bool, device=self.ids.device)
        return self._forward(self.ids, mask)

    def step(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Append tokens [b], equal on every stage, and return the logits as `prefill` does."""
        self.context.enable_decode_mode()
        end = self.context.sequence_len_offset + 1
        mask = self.is_padding[:, None, None, :end] if self.has_padding else None
        return self._forward(tokens[:, None], mask)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        start = self.context.sequence_len_offset
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        logits = None
        for gpt in self.model.gpts:
            gpt.set_input_tensor(None if gpt.pre_process else self._receive(ids))
            out = gpt(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                inference_context=self.context,
                runtime_gather_output=True,
            )
            if gpt.post_process:
                logits = out[:, -1]
            else:
                dist.send(out.contiguous(), self._neighbour(1), group=self.parallel.pp_group)
        self.context.sequence_len_offset += ids.shape[1]
        return logits

    def _receive(self, ids: torch.Tensor) -> torch.Tensor:
        """Receive the previous stage's hidden states [s, b, h]."""
        b, s = ids.shape
        hidden = torch.empty(s, b, self.model.config.hidden_size, dtype=self.model.dtype, device=ids.device)
        dist.recv(hidden, self._neighbour(-1), group=self.parallel.pp_group)
        return hidden

    def _neighbour(self, step: int) -> int:
        """Return the global rank of the next (1) or previous (-1) stage; virtual stages wrap around."""
        assert self.parallel.pp_group is not None
        return dist.get_global_rank(self.parallel.pp_group, (self.parallel.pp_rank + step) % self.parallel.pp_size)


@contextlib.contextmanager
def decode_mode(model: ModelChunks) -> Iterator[None]:
    """Put the model in eval mode, in which Megatron-Core uses its cache, and restore it afterwards.

    Sequence and context parallelism, which cannot split a single position, are off inside.
    """
    training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_sequence_parallel(model))
        for gpt in model.gpts:
            stack.enter_context(_without_context_parallel(gpt))
        try:
            yield
        finally:
            model.train(training)


@contextlib.contextmanager
def _without_sequence_parallel(model: ModelChunks) -> Iterator[None]:
    """Switch sequence parallelism off inside the context.

    Megatron-Core's own switch identifies a model by its address, which may be reused, and on the way back switches on
    what was off before.
    """
    switches = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    owners: list[object] = [model.config, *model.modules()]
    enabled = [(owner, name) for owner in owners for name in switches if getattr(owner, name, False) is True]
    for owner, name in enabled:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in enabled:
            setattr(owner, name, True)


@contextlib.contextmanager
def _without_context_parallel(gpt: GPTModel) -> Iterator[None]:
    """Switch context parallelism off inside the context: each CP rank decodes its own sequences.

    Rotary embeddings and Transformer Engine's attention must not shard the positions.
    """
    rotary = gpt.rotary_pos_emb
    group, rotary.cp_group = rotary.cp_group, None
    fused = [m for m in gpt.modules() if hasattr(m, "set_context_parallel_group") and m.cp_group is not None]
    before = [(m.cp_group, m.cp_global_ranks, m.cp_stream, m.cp_comm_type) for m in fused]
    for module in fused:
        module.set_context_parallel_group(None, None, None)
    try:
        yield
    finally:
        rotary.cp_group = group
        for module, options in zip(fused, before, strict=True):
            module.set_context_parallel_group(*options)
