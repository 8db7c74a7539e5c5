"""Responses by Megatron ranks that were started for them.

A response's random numbers are a function of (seed, benchmark, problem, sample), and sequences are generated together
in batches that do not depend on what is finished already, so an evaluation that was killed goes on as if it had not
been.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.folder import EvaluationFolder
from eaopd_megatron.evaluation.generations import Generation, Place, read_prompts


def generate(
    folder: EvaluationFolder, model: Path, missing: dict[str, list[Place]], tensor_parallel: int, batch_size: int
) -> int:
    """Generates what is missing of each benchmark. The exit code of the ranks."""
    from eaopd_megatron.launch import launch

    path = folder.path / "work.json"
    work = {"model": str(model), "tensor_parallel": tensor_parallel, "batch_size": batch_size, "missing": missing}
    path.write_text(json.dumps({**work, "folder": str(folder.path)}))
    try:
        return launch(["evaluate", str(path)], tensor_parallel)
    finally:
        path.unlink()


def on_rank(work: dict[str, Any]) -> None:
    """One rank of `generate`."""
    import torch

    from eaopd_megatron.checkpoint.hf_folder import HfFolder
    from eaopd_megatron.checkpoint.hf_import import load_hf
    from eaopd_megatron.data.samples import Sampling
    from eaopd_megatron.megatron import groups
    from eaopd_megatron.megatron.architecture import check_config
    from eaopd_megatron.megatron.model import build_model
    from eaopd_megatron.rollout.local import LocalRollout

    tensor_parallel, batch_size = work["tensor_parallel"], work["batch_size"]
    layout = groups.Layout(tensor_parallel, sequence_parallel=tensor_parallel > 1)  # experts ask for it
    parallel, _ = groups.start(layout)
    source = HfFolder.open(work["model"], "MODEL")
    check_config(source.config, layout, work["model"])
    model = build_model(source.config, layout, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    load_hf(model, source, parallel)
    rollout = LocalRollout(model, parallel, vocab_size=source.vocab_size, batch_size=batch_size)
    folder, tokenizer = EvaluationFolder(Path(work["folder"])), source.tokenizer()
    settings = folder.settings()
    sampling = Sampling(**{**settings["sampling"], "stop_ids": tuple(settings["sampling"]["stop_ids"])})
    for name, places in work["missing"].items():
        prompts, store, missing = read_prompts(folder.prompts(name)), folder.generations(name), set(map(tuple, places))
        every = [(problem, sample) for problem in range(len(prompts)) for sample in range(settings["samples"])]
        for start in range(0, len(every), batch_size):
            batch = every[start : start + batch_size]
            if missing.isdisjoint(batch):
                continue
            keys = [(settings["seed"], "evaluation", name, *place) for place in batch]
            samples = rollout.generate([prompts[problem] for problem, _ in batch], keys, sampling, 0)
            if parallel.is_main:
                made = zip(batch, samples, strict=True)
                store.append(
                    Generation(
                        *place,
                        tokenizer.decode(one.response_ids, skip_special_tokens=True),
                        len(one.response_ids),
                        one.finish_reason,
                    )
                    for place, one in made
                    if place in missing
                )
                print(f"{name}: {min(start + batch_size, len(every))} of {len(every)} responses", flush=True)
    groups.stop()


def check_length(positions: int, response: int, setting: str = "--max-response-tokens ") -> int:
    """The longest prompt (tokens) that leaves room for the response. UserError, which names the setting, where none
    does."""
    if positions <= response:
        raise UserError(
            f"{setting}{response}: the model has {positions} positions for prompt and response together; lower it"
        )
    return positions - response
