"""`eaopd evaluate`: a Hugging Face folder on benchmarks, generated on Megatron ranks of its own."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.results import EvaluationResult

BATCH = 256  # sequences generated together on a rank


def evaluate(
    model: str,
    benchmarks: list[str],
    samples: int,
    tensor_parallel: int,
    temperature: float,
    top_p: float,
    max_response_tokens: int,
    problems: int | None,
    seed: int,
    out: Path | None,
    suffix: str = "",
) -> int:
    """Start the ranks, print a line a benchmark, write `out` (JSON, every sample's grade) where it is given. The exit
    code."""
    from eaopd_megatron.launch import launch

    if samples < 1:
        raise UserError(f"--samples {samples}: at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        options = {
            "model": model,
            "benchmarks": benchmarks,
            "samples": samples,
            "tensor_parallel": tensor_parallel,
            "temperature": temperature,
            "top_p": top_p,
            "max_response_tokens": max_response_tokens,
            "problems": problems,
            "seed": seed,
            "suffix": suffix,
            "folder": scratch,
        }
        path = Path(scratch) / "options.json"
        path.write_text(json.dumps(options))
        code = launch(["evaluate", str(path)], tensor_parallel)
        if code:
            return code
        result = EvaluationResult.read(Path(scratch) / "000000.json")
        for line in lines(result):
            print(line)
        if out is not None:
            written = result.write(out.parent)
            os.replace(written, out)
            print(f"written: {out}")
    return 0


def lines(result: EvaluationResult) -> list[str]:
    """One line a benchmark: avg@K, every pass@k, different right answers, truncated share, grader errors."""
    return [
        f"{name} ({b.problems} problems x {b.samples} samples): "
        + "  ".join(f"{figure} {value:.4g}" for figure, value in b.figures.items())
        for name, b in result.benchmarks.items()
    ]


def evaluate_on_rank(options: dict[str, Any]) -> None:
    """One rank of `evaluate`."""
    import torch

    from eaopd_megatron.checkpoint.hf_folder import HfFolder
    from eaopd_megatron.checkpoint.hf_import import load_hf
    from eaopd_megatron.data.prompts import PromptBuilder
    from eaopd_megatron.data.samples import Sampling
    from eaopd_megatron.evaluation.runner import Benchmark, Evaluator
    from eaopd_megatron.megatron import groups
    from eaopd_megatron.megatron.architecture import check_config
    from eaopd_megatron.megatron.model import build_model
    from eaopd_megatron.rollout.local import LocalRollout

    tensor_parallel = options["tensor_parallel"]
    layout = groups.Layout(tensor_parallel, sequence_parallel=tensor_parallel > 1)  # experts ask for it
    parallel, _ = groups.start(layout)
    folder = HfFolder.open(options["model"], "MODEL")
    check_config(folder.config, layout, options["model"])
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = build_model(folder.config, layout, dtype)
    load_hf(model, folder, parallel)
    tokenizer = folder.tokenizer()
    builder = PromptBuilder(
        tokenizer,
        template="chat" if tokenizer.chat_template else "raw",
        suffix=options["suffix"],
        field="problem",
        max_tokens=folder.config.max_position_embeddings - options["max_response_tokens"],
    )
    evaluator = Evaluator(
        LocalRollout(model, parallel, vocab_size=folder.vocab_size, batch_size=BATCH),
        parallel,
        tokenizer,
        [Benchmark.load(source, builder, options["problems"]) for source in options["benchmarks"]],
        options["samples"],
        Sampling(options["temperature"], options["top_p"], options["max_response_tokens"], tuple(folder.eos_ids)),
        options["seed"],
    )

    def notify(text: str) -> None:
        if parallel.is_main:
            print(text, flush=True)

    evaluator.write(evaluator.run(0, notify), Path(options["folder"]))
    groups.stop()
