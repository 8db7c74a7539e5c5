"""One decoding step at a time on a GPTModel with Megatron-Core's key-value cache."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from eaopd_megatron.megatron.forward import without_sequence_parallel
from eaopd_megatron.megatron.model import ModelChunks


class Decoder:
    """Decodes a batch of prompts of unequal lengths, padded on the left (rotary embeddings see only distances).

    The model must be in eval mode: Megatron-Core uses the cache only then.
    """

    def __init__(self, model: ModelChunks, prompts: list[list[int]], max_new_tokens: int, device: torch.device) -> None:
        longest = max(len(p) for p in prompts)
        (self.model,) = model.gpts
        self.context = StaticInferenceContext(len(prompts), longest + max_new_tokens)
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        for row, prompt in zip(self.ids, prompts, strict=True):
            row[longest - len(prompt) :] = torch.tensor(prompt, device=device)
        padding = torch.tensor([longest - len(p) for p in prompts], device=device)
        # [b, longest + max_new_tokens]; None where nothing is hidden
        self.hidden = torch.arange(longest + max_new_tokens, device=device)[None] < padding[:, None]
        self.padded = bool(self.hidden.any())

    def prefill(self) -> torch.Tensor:
        """Logits [b, V_padded] after the last prompt token, the same on every tensor-parallel rank."""
        mask = None
        if self.padded:
            length = self.ids.shape[1]
            future = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).triu(1)
            mask = future | self.hidden[:, None, None, :length]
            # a padding position sees itself: a row that sees nothing would be NaN and reach others through its value
            mask = mask & ~torch.eye(length, dtype=torch.bool, device=self.ids.device)
        return self._forward(self.ids, mask)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [b, V_padded] after tokens [b] have been appended."""
        self.context.enable_decode_mode()
        end = self.context.sequence_len_offset + 1
        mask = self.hidden[:, None, None, :end] if self.padded else None
        return self._forward(tokens[:, None], mask)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        start = self.context.sequence_len_offset
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        with torch.no_grad(), without_sequence_parallel(self.model):
            logits = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                inference_context=self.context,
                runtime_gather_output=True,
            )
        self.context.sequence_len_offset += ids.shape[1]
        return logits[:, -1]
