"""Host memory of an import and of an export of a 200 MB model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eaopd_megatron.checkpoint.safetensors_io import PlannedTensor, TensorWriter
from eaopd_megatron.models.families import FAMILIES
from tests.ranks import ROOT

SCRIPT = Path(__file__).with_name("memory_of_conversion.py")
SLACK = 16 * 10**6
"""Bytes for what an allocator keeps, and for safetensors and Python."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its peak there")
def test_an_import_holds_the_model_and_twice_its_largest_tensor_and_an_export_no_more(tmp_path: Path) -> None:
    """A whole state dict beside the model would need another 200 MB, and a teacher's would fit no host."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=20,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    shapes = FAMILIES["Qwen3ForCausalLM"].hf_shapes(config)
    plan = [PlannedTensor(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    with TensorWriter(tmp_path, plan, 10**8) as writer:
        for tensor in plan:
            writer.write(tensor.name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    transient = 2 * found["largest"] + SLACK
    assert found["model"] > 200 * 10**6 > 2 * transient, "the limits would not tell a whole state dict from a tensor"
    assert found["import"] <= found["model"] + transient
    assert found["export"] <= transient
