"""A Megatron-Core checkpoint → a Hugging Face folder that transformers, SGLang and vLLM load.

    python tools/mcore_to_hf.py --checkpoint DIR --out DIR [--verify]

DIR is what tools/hf_to_mcore.py wrote, or a run's checkpoints/step_... folder. One process, whatever layout wrote it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from eaopd_megatron.launch.entrypoint import run_entrypoint
from eaopd_megatron.utils import files as atomic
from eaopd_megatron.utils.log import log_rank0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Megatron-Core checkpoint → Hugging Face folder", allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="an import, or a run's step folder"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder; appears when complete")
    parser.add_argument(
        "--verify", action="store_true", help="compare the checkpoint's logits with transformers' on it"
    )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> int:
    """Export. Returns the exit code; raises UserError."""
    atomic.require_absent_or_empty(options.out, "--out")
    from eaopd_megatron.checkpoint import convert as conversion

    conversion.export_checkpoint(options.checkpoint, options.out, verify=options.verify, log=log_rank0)
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; errors of the user are one line."""
    return run_entrypoint(lambda: convert(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
