"""A tiny student on ranks, trained under plain cross entropy or driven with given gradients."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import ChainedOptimizer

from eaopd_megatron.checkpoint.hf_export import gather_hf_tensors
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import response_logits
from eaopd_megatron.megatron.model import DTYPES, ModelChunks, build_model
from eaopd_megatron.megatron.optimizer import (
    build_optimizer,
    finalize_gradients,
    optimizer_step,
    set_learning_rate,
    wrap_ddp,
)
from eaopd_megatron.megatron.pipeline import micro_batches, run_forward_backward
from tests.distributed.groups import model_parallel

Precision = Literal["fp32", "bf16"]
LEARNING_RATES = (3e-3, 2e-3, 1e-3, 5e-4)
OPTIMIZER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "clip_grad": 1.0}


@contextlib.contextmanager
def world(folder: str, ranks: int, layout: ParallelLayout) -> Iterator[ParallelState | None]:
    """The first `ranks` ranks as a world of their own with Megatron's groups; None on the others."""
    rank, everyone = dist.get_rank(), dist.get_world_size()
    os.makedirs(folder, exist_ok=True)
    if ranks < everyone:
        _join(f"{folder}/part", rank, ranks)
    try:
        with model_parallel(layout) if rank < ranks else contextlib.nullcontext() as parallel:
            yield parallel
    finally:
        if ranks < everyone:
            _join(f"{folder}/all", rank, everyone)


def _join(meeting: str, rank: int, ranks: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank < ranks:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        dist.barrier()  # none may leave while another still connects


class Trainer:
    """A tiny student under plain cross entropy, built from nothing."""

    def __init__(self, hf: str, parallel: ParallelState, precision: Precision = "fp32", **options: Any) -> None:
        self.parallel, self.folder = parallel, HfFolder.open(hf, "student.model")
        recompute = options.pop("recompute", "none")
        placed = {key: options.pop(key) for key in ("distributed", "overlap", "bucket_size") if key in options}
        self.model: ModelChunks = build_model(
            self.folder.config, parallel.layout, DTYPES[precision], recompute=recompute
        )
        load_hf(self.model, self.folder, parallel)
        self.ddp: ModelChunks = wrap_ddp(self.model, **placed)
        chosen = OPTIMIZER | {"lr": 1.0} | options
        self.optimizer: ChainedOptimizer = build_optimizer(self.ddp, OptimizerConfig(**chosen))
        self.samples = json.loads((Path(hf) / "samples.json").read_text())

    def update(self, learning_rate: float, scale: float = 1.0) -> tuple[float, float]:
        """(mean loss over all tokens of all ranks, gradient norm) of one update; a micro-batch a sample."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        mine = self.samples[self.parallel.dp_rank :: self.parallel.dp_size]
        batches = micro_batches([sample_of(ids) for ids in mine], 1, self.parallel)
        figures = torch.zeros(2)  # sum of losses, tokens

        def last(index: int, rows: torch.Tensor) -> torch.Tensor:
            tokens = batches[index].target_ids
            logits = response_logits(self.ddp, rows).float()
            loss = tensor_parallel.vocab_parallel_cross_entropy(logits[:, None], tokens[:, None]).sum()
            figures.add_(torch.stack([loss.detach(), torch.tensor(float(len(tokens)))]))
            return loss * scale

        run_forward_backward(self.ddp, batches, last)
        finalize_gradients(self.ddp, figures[1])
        set_learning_rate(self.optimizer, learning_rate)
        ok, norm = optimizer_step(self.optimizer)
        assert ok is torch.isfinite(torch.tensor(norm)).item()
        dist.all_reduce(figures)  # a mean: the ranks that saw the same tokens change nothing
        return (figures[0] / figures[1]).item(), norm

    def train(self, learning_rates: tuple[float, ...]) -> list[tuple[float, float]]:
        return [self.update(learning_rate) for learning_rate in learning_rates]

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of weights, main parameters and Adam's moments."""
        values = {name: parameter.detach().clone() for name, parameter in self.model.global_parameters().items()}
        for index, parameter in enumerate(self.optimizer.chained_optimizers[0].get_parameters()):
            values[f"main {index}"] = parameter.detach().clone()
            for key, value in self.optimizer.optimizer.state[parameter].items():
                values[f"{key} {index}"] = value.clone()
        return values

    def drive(self, gradients: dict[str, torch.Tensor], scale: float, learning_rate: float) -> float:
        """The gradient's norm in one update with `scale` times the gradients (`gradients_of`), at any layout."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for name, parameter in self.model.global_parameters().items():
            parameter.main_grad.copy_(gradients[name] * (scale * self._share(name, parameter)))  # type: ignore[attr-defined]
        finalize_gradients(self.ddp, torch.ones(1))
        set_learning_rate(self.optimizer, learning_rate)
        ok, norm = optimizer_step(self.optimizer)
        assert ok
        return norm

    def _share(self, name: str, parameter: torch.nn.Parameter) -> float:
        """What this rank gives of a gradient that `finalize_gradients` will sum over ranks."""
        if name == "output_layer.weight" and self.folder.config.tie_word_embeddings:
            return 0.0  # the last stage's copy: the first stage gives all
        if not getattr(parameter, "allreduce", True):  # an expert's gradient has the tokens of all ranks
            sharing = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
            return sharing / parallel_state.get_expert_data_parallel_world_size()
        summed = getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name
        return 1 / self.parallel.tp_size if summed else 1.0

    def whole(self) -> dict[str, torch.Tensor]:
        """The weights under transformers' names on the first rank. Collective."""
        parameters: dict[str, torch.Tensor] = dict(self.model.global_parameters())
        return {name: tensor.clone() for name, tensor in gather_hf_tensors(parameters, self.folder, self.parallel)}


def sample_of(ids: list[int]) -> Sample:
    """A response to its own first token."""
    return Sample(Prompt("", (ids[0],), {}), ids[1:], "length", [], 0)


def gradients_of(folder: str, parallel: ParallelState) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder, cut as this rank's parameters, to be used as their gradients."""
    source = HfFolder.open(folder, "gradient")
    model = build_model(source.config, parallel.layout, torch.float32)
    load_hf(model, source, parallel)
    return {name: parameter.detach() for name, parameter in model.global_parameters().items()}
