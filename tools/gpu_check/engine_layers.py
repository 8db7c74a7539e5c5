"""Compare Transformer Engine's layers with Megatron-Core's local ones on one GPU: values, decoding, speed of an update.

python tools/gpu_check/engine_layers.py MODELS       MODELS: the folder of make_models.py
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

import torch

from eaopd_megatron.checkpoint.convert import single_process_group
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron import layers
from eaopd_megatron.megatron import model as model_module
from eaopd_megatron.megatron.generation import Decoder, decode_mode
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.pipeline import run_forward, single_batch
from tools.gpu_check.findings import record
from tools.gpu_check.fixed_trainer import FixedTrainer, load_student

CUDA = torch.cuda.is_available()
LENGTH = 2048 if CUDA else 32
PROMPT_LENGTHS = (9, 4, 7)
FORCED_TOKENS = (5, 9, 11)
TOLERANCE = 3e-2
"""Largest relative difference of two bf16 forward passes of 28 layers (norm over norm)."""


def build(source: HfFolder, parallel: ParallelState, *, engine: bool) -> ModelChunks:
    for module in (layers, model_module):
        module.uses_transformer_engine = lambda: engine  # type: ignore[attr-defined]
    return load_student(source, parallel)


def hidden_states(model: ModelChunks, ids: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    found: list[torch.Tensor] = []
    run_forward(model, [single_batch(ids, parallel)], lambda index, hidden: found.append(hidden.float()))
    return found[0]


def decoded(model: ModelChunks, prompts: list[list[int]], parallel: ParallelState) -> torch.Tensor:
    """Return the logits after the prompts and after three more tokens, which are given."""
    with decode_mode(model):
        decoder = Decoder(model, prompts, len(FORCED_TOKENS), parallel)
        logits = [decoder.prefill()]
        for token in FORCED_TOKENS:
            logits.append(decoder.step(torch.full((len(prompts),), token, device=parallel.device)))
    return torch.stack([step for step in logits if step is not None], 1).float()


def update(model: ModelChunks, ids: torch.Tensor, parallel: ParallelState) -> tuple[float, float]:
    """Return the gradient norm and the seconds of the last of three updates."""
    trainer = FixedTrainer(model, ids, parallel, lr=1e-5)
    norm = seconds = 0.0
    for _ in range(3):
        started = time.monotonic()
        norm = trainer.update()  # waits for the device
        seconds = time.monotonic() - started
    return norm, round(seconds, 3)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    source = HfFolder.open(f"{sys.argv[1]}/student", "student.model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.vocab_size, (4, LENGTH), generator=generator)
    prompts = [torch.randint(0, source.vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    with single_process_group() as parallel:
        found = {}
        for engine in (False, True):
            name = "Transformer Engine" if engine else "local"
            model = build(source, parallel, engine=engine)
            found[engine] = hidden_states(model, ids, parallel)
            alone = torch.cat([decoded(model, [prompt], parallel) for prompt in prompts])
            apart = distance(decoded(model, prompts, parallel), alone)
            record(f"{name}: prompts of unequal lengths together against alone", apart, apart <= TOLERANCE)
            record(f"{name}: gradient norm and seconds of an update", list(update(model, ids[:1], parallel)))
            del model
        apart = distance(found[True], found[False])
        record("hidden states, Transformer Engine's against local ones", apart, apart <= TOLERANCE)
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
