"""A student with its optimizer, which makes updates of an arbitrary loss on fixed tokens."""

from __future__ import annotations

from typing import Any

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import response_logits
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.megatron.optimizer import build_optimizer, finalize_gradients, optimizer_step, wrap_ddp
from eaopd_megatron.megatron.pipeline import run_forward_backward, single_batch


def load_student(source: HfFolder, parallel: ParallelState) -> ModelChunks:
    """Build the model in bf16 and load its weights."""
    model = build_model(source.config, parallel.layout, torch.bfloat16)
    load_hf(model, source, parallel)
    return model


class FixedTrainer:
    """Updates a model by the sum of logsumexp over its logits of ids [b, s]."""

    def __init__(self, model: ModelChunks, ids: torch.Tensor, parallel: ParallelState, **settings: Any) -> None:
        """settings: those of OptimizerConfig that differ from its defaults."""
        options = OptimizerConfig(**settings)
        self.model, self.tokens = model, ids.numel()
        self.ddp = wrap_ddp(model, distributed=options.distributed)
        self.optimizer = build_optimizer(self.ddp, options)
        self.batch = single_batch(ids, parallel)

    @classmethod
    def load(cls, source: HfFolder, parallel: ParallelState, **settings: Any) -> FixedTrainer:
        """Return a trainer of the student on 256 random tokens."""
        ids = torch.randint(0, source.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
        return cls(load_student(source, parallel), ids, parallel, lr=1e-4, **settings)

    def update(self) -> float:
        """Return the gradient norm."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(index: int, hidden: torch.Tensor) -> torch.Tensor:
            return response_logits(self.model, hidden).float().logsumexp(-1).sum()

        run_forward_backward(self.ddp, [self.batch], loss)
        finalize_gradients(self.ddp, torch.tensor(self.tokens))
        return optimizer_step(self.optimizer)[1]
