"""The real server takes every transport's weights. One of two tensor-parallel ranks, started once, serves all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.server import SGLangSettings, sglang_command, sglang_servers
from eaopd_megatron.serving.supervisor import Supervisor
from tests import tiny_models
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_weights.py")
KEY = "a-key-for-this-test"
pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    tiny_models.build("qwen3").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        sglang_command(cuda=torch.cuda.is_available())
    except UserError as missing:
        pytest.skip(str(missing))
    settings = SGLangSettings(
        folder, 32, tensor_parallel=2, precision="fp32", mem_fraction_static=0.1, max_concurrent_requests=4, api_key=KEY
    )
    with Supervisor(sglang_servers(settings, 1, tmp_path_factory.mktemp("logs"))) as supervisor:
        yield supervisor.servers[0].url


@pytest.mark.parametrize(
    ("transport", "large"), [("distributed", 2**20), ("distributed", 1), ("tensor", 0), ("disk", 0)]
)
def test_a_real_server_has_other_weights_than_the_trainer(
    ranks: Ranks, folder: Path, url: str, tmp_path: Path, transport: str, large: int
) -> None:
    """Log-probs are transformers' after every update of TP2xPP2 ranks."""
    ranks.run(
        CHECKS,
        "check_log_probs",
        folder=str(folder),
        scratch=str(tmp_path),
        url=url,
        key=KEY,
        transport=transport,
        large=large,
    )
