"""Compare a served teacher's gate, from top-k bounds, with the gate of the exact entropy, token by token.

    python tools/compare_served_teacher.py [--student DIR --teacher DIR] [--prompts N] [--k K ...] [--threshold NATS]

It starts an SGLang server of the student, which generates responses, and one of the teacher, which scores them. The
exact entropy comes from transformers on the same tokens, in fp32. Prompts are Countdown's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eaopd_megatron.checkpoint.hf_folder import HfFolder, common_vocab_size  # noqa: E402
from eaopd_megatron.data.prompts import PromptBuilder  # noqa: E402
from eaopd_megatron.data.sources import load_problems  # noqa: E402
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams  # noqa: E402
from eaopd_megatron.launch.entrypoint import run_entrypoint  # noqa: E402
from eaopd_megatron.objective import Objective, TeacherTopK, entropy_bounds  # noqa: E402
from eaopd_megatron.objective.token_losses import compute_gate  # noqa: E402
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, verify_server  # noqa: E402
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, required_context_length  # noqa: E402
from eaopd_megatron.rollout.sglang.server import SGLangSettings, sglang_servers  # noqa: E402
from eaopd_megatron.serving.http import SGLangClient  # noqa: E402
from eaopd_megatron.serving.pool import ServerPool  # noqa: E402
from eaopd_megatron.serving.supervisor import Supervisor  # noqa: E402
from eaopd_megatron.teacher.eos_map import TerminalMap  # noqa: E402
from eaopd_megatron.teacher.served import ServedBackend, ServedScoreCall  # noqa: E402

PAIR = ROOT / "recipes/countdown"
RUNNING = 16
LONGEST = 64
"""Tokens of a prompt and its response."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--student", default=str(PAIR / "student"))
    parser.add_argument("--teacher", default=str(PAIR / "teacher"))
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--response-tokens", type=int, default=16)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16, 64, 112])
    parser.add_argument("--threshold", type=float, default=0.8, help="nats")
    arguments = parser.parse_args()
    student, teacher = HfFolder.open(arguments.student), HfFolder.open(arguments.teacher)
    builder = PromptBuilder(student.tokenizer(), template="raw", suffix="", field="problem", max_tokens=LONGEST)
    prompts, _ = builder.build(load_problems("countdown", "train")[: arguments.prompts], "countdown")
    sampling = SamplingParams(1.0, 1.0, arguments.response_tokens, tuple({*student.eos_ids, *teacher.eos_ids}))
    with served(student) as url:
        samples = asyncio.run(generate(url, student, prompts, sampling))
    with served(teacher) as url:
        scored = {k: asyncio.run(score(url, source(student, teacher, k), samples)) for k in arguments.k}
    show(scored, exact_entropy(teacher, samples), arguments.threshold, common_vocab_size([student, teacher]))


@contextmanager
def served(folder: HfFolder) -> Iterator[str]:
    """Yield the URL of a server of the model."""
    context = required_context_length(LONGEST)
    settings = SGLangSettings(
        folder.path, context, precision="fp32", mem_fraction_static=0.1, max_concurrent_requests=RUNNING
    )
    with tempfile.TemporaryDirectory() as logs, Supervisor(sglang_servers(settings, 1, Path(logs))) as supervisor:
        yield supervisor.servers[0].url


def source(student: HfFolder, teacher: HfFolder, k: int) -> ServedBackend:
    terminal = TerminalMap.between("swap", student.eos_ids, teacher.eos_ids)
    size = common_vocab_size([student, teacher])
    return ServedBackend(teacher, vocab_size=size, k=min(k, size), terminal=terminal, connections=RUNNING)


async def generate(url: str, student: HfFolder, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
    """Return a response to each prompt."""
    expected = ExpectedModel(student.family.architecture, student.vocab_size, LONGEST)
    calls = [GenerateRequest(str(i), prompt.token_ids, sampling) for i, prompt in enumerate(prompts)]
    pool = ServerPool([SGLangClient(url, connections=RUNNING)], partial(verify_server, expected=expected))
    await pool.open()
    samples = [done.to_sample(prompts[int(done.id)], int(done.id)) async for done in pool.run(calls)]
    await pool.close()
    return sorted(samples, key=lambda sample: sample.index)


async def score(url: str, source: ServedBackend, samples: Sequence[Sample]) -> TeacherTopK:
    """Return the teacher's top-k of all response tokens, sample after sample."""
    pool = ServerPool([source.client(url, None)], partial(source.validate, longest=LONGEST))
    await pool.open()

    async def one(call: ServedScoreCall) -> torch.Tensor:
        return await anext(pool.run([call]))

    rows = await asyncio.gather(*(one(call) for call, _ in source.calls(samples, "compare")))
    await pool.close()
    return source.payload_format.decode(torch.cat(rows))


@torch.no_grad()
def exact_entropy(teacher: HfFolder, samples: Sequence[Sample]) -> torch.Tensor:
    """Return [tokens] nats, computed by transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher.path, dtype=torch.float32)
    entropies = []
    for sample in samples:
        logits = model(torch.tensor([sample.token_ids])).logits[0, len(sample.prompt.token_ids) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    return torch.cat(entropies)


def show(scored: Mapping[int, TeacherTopK], exact: torch.Tensor, threshold: float, vocab_size: int) -> None:
    """Print a line for each k: shares of tokens whose gate the bounds leave open, and whose gate is the same."""
    objective = Objective.preset("eopd", threshold=threshold)
    truth = compute_gate(objective, exact, exact)[0].bool()
    print(f"{len(exact)} tokens, {truth.float().mean():.2%} of them above {threshold:g} nats")
    print(f"{'k':>5} {'ambiguous':>10} {'agreement':>10} {'where certain':>14} {'widest bounds':>14} {'mass':>8}")
    for k, top_k in scored.items():
        lower, upper = entropy_bounds(top_k.logprobs, vocab_size)
        gate, ambiguous = compute_gate(objective, lower, upper)
        same, certain = gate.bool() == truth, ~ambiguous
        print(
            f"{k:>5} {ambiguous.float().mean():>10.2%} {same.float().mean():>10.2%} "
            f"{same[certain].float().mean():>14.2%} {(upper - lower).max():>14.3g} "
            f"{top_k.logprobs.exp().sum(1).mean():>8.4f}"
        )


if __name__ == "__main__":
    raise SystemExit(run_entrypoint(main))
