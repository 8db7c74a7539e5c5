"""A double that holds a real student: tokens and log-probs are the model's, and its weights are really replaced.

A process of its own, started with the command line of the real server, of which it ignores what it does not know::

    python -m tools.sglang_double.student --model-path DIR [--port N] [--context-length N] [--config FILE] [...]

`stand_in` makes a folder of it that `$EAOPD_SGLANG_VENV` may name instead of SGLang's environment. All running
requests are stepped as one batch, in fp32 and without a cache: it is for small models and short texts.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.sglang_double.qwen3 import Qwen3
from tools.sglang_double.server import Double, command_line, serve

ROOT = Path(__file__).resolve().parents[2]


class StudentDouble(Double):
    """See the module. folder: the student's."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.model = Qwen3(folder)
        super().__init__(
            vocab_size=self.model.vocab_size,
            eos_id=self.model.eos_id,
            architecture=self.model.architecture,
            **settings,
        )
        self.model_path = str(folder)
        self._asked: list[tuple[Sequence[int], asyncio.Future[tuple[list[float], str]]]] = []
        self._stepping: asyncio.Task[None] | None = None
        self._weights_in_use = threading.Lock()
        self._controls, self._doing = 0, "idle"

    async def _next(self, ids: Sequence[int]) -> tuple[list[float], str]:
        answer: asyncio.Future[tuple[list[float], str]] = asyncio.get_running_loop().create_future()
        self._asked.append((ids, answer))
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step())
        return await answer

    async def _step(self) -> None:
        """Answers all who ask, again and again, until nobody does. The model is in a thread, so that HTTP goes on."""
        while self._asked:
            asked, self._asked = self._asked, []
            found = await asyncio.to_thread(self._look, [ids for ids, _ in asked])
            for (_, answer), logprobs in zip(asked, found, strict=True):
                if not answer.done():
                    answer.set_result((logprobs, self.weight_version))
            await asyncio.sleep(0)  # they ask for their next tokens
        self._stepping = None

    def _look(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        with self._weights_in_use:
            found: list[list[float]] = self.model.next_logprobs(sequences).tolist()
        return found

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with self._weights_in_use:
            self.model.replace(tensors)

    async def answer(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Any:
        """Says what the server is doing whenever that changes, as its log."""
        controls = method == "POST" and path != "/generate"
        self._controls += controls
        self._tell(generating=path == "/generate")
        try:
            return await super().answer(method, path, headers, raw)
        finally:
            self._controls -= controls
            self._tell()

    def _tell(self, generating: bool = False) -> None:
        busy = self._controls or self.session or self.paused
        doing = "updating" if busy else "generating" if generating or self.running else "idle"
        if doing != self._doing:
            self._doing = doing
            print(f"{doing} at {self.weight_version}", flush=True)


def stand_in(folder: Path) -> Path:
    """Makes an environment in which `python -m sglang.launch_server` is this double, and returns it."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    # the first two arguments are those with which SGLang is named
    command = shlex.join([sys.executable, "-m", "tools.sglang_double.student"])
    python.write_text(f'#!/bin/bash\nexport PYTHONPATH={shlex.quote(str(ROOT))}\nexec {command} "${{@:3}}"\n')
    python.chmod(0o755)
    return folder


def main() -> None:
    parser = command_line()
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--max-total-tokens", type=int, default=16384)
    parser.add_argument("--weight-version", default="default")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    settings = {
        "context_length": arguments.context_length,
        "max_total_num_tokens": arguments.max_total_tokens,
        "weight_version": arguments.weight_version,
    }
    serve(partial(StudentDouble, arguments.model_path, **settings), arguments)


if __name__ == "__main__":
    main()
