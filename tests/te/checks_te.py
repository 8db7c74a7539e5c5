"""Checks of test_te.py: the project's models on Transformer Engine's layers, on two ranks without CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.dist_checkpoint import (
    load_sharded,
    load_training_state,
    save_sharded,
    sharded_training_state,
)
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.distributed.parallel_state import ParallelLayout
from eaopd_megatron.megatron import layers, model
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.megatron.pipeline import gather_logits
from tests.distributed import checks_models
from tests.distributed.groups import model_parallel


@contextlib.contextmanager
def engine(use: bool = True) -> Iterator[None]:
    """Layers are Transformer Engine's, as on a machine with CUDA."""
    from transformer_engine.pytorch.optimizers import FusedAdam  # what Megatron-Core's optimizers are with it

    with contextlib.ExitStack() as stack:
        for module in (layers, model):
            stack.enter_context(mock.patch.object(module, "uses_transformer_engine", lambda: use))
        stack.enter_context(cuda_as_cpu())
        assert FusedAdam is not None
        yield


def kinds(built: ModelChunks) -> set[str]:
    return {type(module).__name__ for module in built.modules()}


def check_logits_and_gradients(group: dist.ProcessGroup, folder: str, layout: dict[str, Any]) -> None:
    with engine():
        checks_models.check_logits_and_gradients(group, folder, layout)


def check_decoding(group: dist.ProcessGroup, folder: str, tp: int, sp: bool) -> None:
    with engine():
        checks_models.check_decoding(group, folder, tp, sp)


def check_no_host_reads(group: dist.ProcessGroup, folder: str, layout: dict[str, Any]) -> None:
    with engine():
        checks_models.check_no_host_reads(group, folder, layout)


def check_layers(group: dist.ProcessGroup, folder: str, expected: list[str], fused_rotary: bool) -> None:
    """No layer of Megatron-Core's own, or of this project's for a CPU, is left."""
    with engine(), model_parallel(ParallelLayout()) as parallel:
        built = build_model(HfFolder.open(folder).config, parallel.layout, torch.float32)
        assert set(expected) <= kinds(built), kinds(built)
        assert not {"CoreAttention", "ColumnParallelLinear", "RowParallelLinear", "SequentialMLP"} & {
            type(module).__name__ for gpt in built.gpts for module in gpt.decoder.modules()
        }
        assert built.config.apply_rope_fusion == fused_rotary


def check_checkpoint(group: dist.ProcessGroup, folder: str, out: str, saved: bool, loaded: bool) -> None:
    """A checkpoint of local layers is loaded into Transformer Engine's, or the other way round, at another layout."""
    source = HfFolder.open(folder)
    with engine(saved), model_parallel(ParallelLayout(2)) as parallel:
        first = checks_models.loaded(source, parallel)
        save_sharded(Path(out), sharded_training_state(first), parallel)
    with engine(loaded), model_parallel(ParallelLayout()) as parallel:
        second = build_model(source.config, parallel.layout, source.dtype)
        state = load_sharded(Path(out), sharded_training_state(second), parallel)
        load_training_state(second, None, state)
        expected = checks_models.loaded(source, parallel).global_parameters()
        found = second.global_parameters()
        assert found.keys() == expected.keys()
        for name, parameter in found.items():
            assert torch.equal(parameter, expected[name]), name


def check_fp8_teacher(group: dist.ProcessGroup, folder: str) -> None:
    """A teacher with fp8 weights has the parameters of one without; its logits are near those."""
    source = HfFolder.open(folder)
    tokens = torch.arange(16).repeat(2, 1)
    with engine(), model_parallel(ParallelLayout()) as parallel, torch.no_grad():
        plain = build_model(source.config, parallel.layout, torch.bfloat16)
        load_hf(plain, source, parallel)
        teacher = build_model(source.config, parallel.layout, torch.bfloat16, fp8=True)
        load_hf(teacher, source, parallel)
        expected, found = plain.global_parameters(), teacher.global_parameters()
        assert {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in expected.items()}
        quantized = {name for name, p in found.items() if type(p).__name__ == "Float8Tensor"}
        assert quantized == {name for name in found if "linear" in name and name.endswith("weight")}, quantized
        for name in quantized:
            stored, exact = found[name].dequantize().float(), expected[name].float()
            assert (stored - exact).abs().max() <= exact.abs().max() / 16, name
        ours, theirs = (gather_logits(each, tokens, parallel) for each in (teacher, plain))
        distance = ((ours - theirs).float().norm() / theirs.float().norm()).item()
        assert distance <= 0.5, f"logits are {distance:.2f} of their norm apart"  # a wrong scale: 1 or more
