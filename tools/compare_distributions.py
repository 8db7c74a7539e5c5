"""Computes the paper's other figures: high-entropy tokens, forward KL on gated tokens, changes of the top-1 token.

    python tools/compare_distributions.py --student DIR --teacher DIR [--before DIR] --responses runs/x/rollouts/*.jsonl

Models are Hugging Face folders, loaded by transformers. The states are the response positions that a run recorded
(run.log_rollouts). Prints one JSON object; `tools/lib/distributions.py` defines the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer, common_vocab_size
from eaopd_megatron.data.sources import read_jsonl
from eaopd_megatron.launch.entrypoint import run_entrypoint
from tools.lib.distributions import Sums, compare_logits, response_logits, token_means


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Compare a student's next-token distributions with its teacher's.", allow_abbrev=False
    )
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--teacher", required=True, metavar="DIR")
    parser.add_argument("--before", metavar="DIR", help="the student before training")
    parser.add_argument("--responses", required=True, nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--threshold", type=float, default=0.8, help="nats (default 0.8)")
    return parser.parse_args(arguments)


def load(folder: HfFolder) -> Any:
    """Load a model, on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=folder.dtype).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> int:
    """Compare and print. Raise UserError."""
    student = HfFolder.open(options.student, "--student")
    teacher = HfFolder.open(options.teacher, "--teacher")
    check_same_tokenizer(teacher, student)
    before = None if options.before is None else HfFolder.open(options.before, "--before")
    size = common_vocab_size([student, teacher])  # vocabularies may be padded to different sizes
    models = [None if folder is None else load(folder) for folder in (student, teacher, before)]

    def parts() -> Iterator[Sums]:
        for row in (row for file in options.responses for row in read_jsonl(file)):
            if not row["response_ids"]:
                continue
            ids = (row["prompt_ids"], row["response_ids"])
            logits = [None if model is None else response_logits(model, *ids, size) for model in models]
            assert logits[0] is not None and logits[1] is not None
            yield compare_logits(logits[0], logits[1], logits[2], options.threshold)

    print(json.dumps({"threshold": options.threshold, **token_means(parts())}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_entrypoint(lambda: run(parse(sys.argv[1:]))))
