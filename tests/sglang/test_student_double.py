"""The double of a student, as a process in place of SGLang: whose tokens it gives before and after new weights."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eaopd_megatron.data.types import SamplingParams
from eaopd_megatron.rollout.sglang import server as module
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, verify_server
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, GenerationOutput, LengthLimits
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings, sglang_servers
from eaopd_megatron.serving.http import SGLangClient
from eaopd_megatron.serving.pool import ServerPool
from eaopd_megatron.serving.supervisor import Supervisor
from tools.sglang_double.student import stand_in

STUDENT = Path(__file__).resolve().parents[2] / "recipes/countdown/student"
KEY = "a-key-for-this-test"
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=12, stop_token_ids=(109,))
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SGLangServer]:
    monkeypatch.setenv(module.SGLANG_VENV_VARIABLE, str(stand_in(tmp_path)))
    settings = SGLangSettings(STUDENT, 64, precision="fp32", max_concurrent_requests=16, api_key=KEY)
    servers = sglang_servers(settings, 1, tmp_path / "logs")
    with Supervisor(servers):
        yield servers[0]


@torch.no_grad()
def assert_greedy(model: Any, prompt: list[int], completion: GenerationOutput) -> None:
    """The tokens and log-probs are those of transformers' model."""
    logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
    best = logits.log_softmax(-1).max(-1)
    assert best.indices.tolist() == completion.token_ids
    torch.testing.assert_close(best.values, torch.tensor(completion.logprobs), rtol=0, atol=1e-5)


def test_a_double_of_a_student_goes_on_with_its_old_weights(student: SGLangServer, tmp_path: Path) -> None:
    prompts = [[1 + i, 20, 40 + i, 3][: 2 + i % 3] for i in range(12)]
    requests = [GenerateRequest(f"r{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)]
    other = tmp_path / "other"
    shutil.copytree(STUDENT, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: w.flip(-1).contiguous() for name, w in weights.items()}, other / "model.safetensors")

    async def work() -> None:
        async def admit(client: SGLangClient) -> LengthLimits:
            return await verify_server(client, ExpectedModel("Qwen3ForCausalLM", vocab_size=112, total_tokens=62))

        client = SGLangClient(student.url, api_key=KEY)
        pool = ServerPool([client], admit)
        await pool.open()
        for folder, version in ((STUDENT, "0"), (other, "1")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            await client.request(
                "POST", "/update_weights_from_disk", {"model_path": str(folder), "weight_version": version}
            )
            completions = [completion async for completion in pool.run(requests)]
            assert len(completions) == len(requests)
            for completion in completions:
                assert_greedy(model, prompts[int(completion.id[1:])], completion)
                assert {span.version for span in completion.weight_spans} == {version}
        await pool.close()

    asyncio.run(work())
    said = student.log.read_text().splitlines()
    assert [line for line in said if " at " in line][-3:] == ["idle at 1", "generating at 1", "idle at 1"]
