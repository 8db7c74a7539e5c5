"""One SGLang server of a job, in a step of its own. It ends with the step, and the step with it."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.guard import say
from eaopd_megatron.rollout.sglang.keeper import server_settings
from eaopd_megatron.rollout.sglang.server import Server
from eaopd_megatron.services.client import read_api_key


def serve(recipe: Recipe, listen: str, key_file: Path, log: Path) -> None:
    """Returns when a signal has ended the server. Raises UserError when it ends by itself.

    listen: HOST:PORT. log: the server's, in which its key never stands.
    """
    host, _, port = listen.rpartition(":")
    student = HfFolder.open(recipe.student.model, "student.model")
    positions = student.config.max_position_embeddings
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
    if recipe.evaluation.benchmarks:  # whose problems are as long as they are
        longest = positions
    settings = server_settings(recipe, student, longest, read_api_key(key_file))
    # the prompts may be shorter than the recipe lets them be, and SGLang refuses more than the model has positions for
    context = min(settings.context_length, positions)
    server = Server(replace(settings, context_length=context, host=host), log)
    server.port = int(port)
    asked, ended = threading.Event(), threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.on_exit = lambda why: ended.set()
    server.start()
    say(f"a rollout server starts at {server.url}")
    ended.wait()
    if not asked.is_set():
        raise UserError(f"the rollout server at {server.url} {server.why()}")
    server.stop()
