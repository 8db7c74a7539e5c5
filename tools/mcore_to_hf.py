"""Convert a Megatron-Core checkpoint into a Hugging Face folder for transformers, SGLang and vLLM.

    python tools/mcore_to_hf.py --checkpoint DIR --out DIR [--verify]

DIR was written by tools/hf_to_mcore.py, or is a run's checkpoints/step_... folder, at any layout. Uses one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from eaopd_megatron.launch.entrypoint import run_entrypoint
from eaopd_megatron.utils import files
from eaopd_megatron.utils.gpu_environment import EXACT_FP32_VARIABLES, set_unless_given
from eaopd_megatron.utils.log import log_rank0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Convert a Megatron-Core checkpoint into a Hugging Face folder", allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="import or step folder of a run")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="Hugging Face folder, created when complete"
    )
    parser.add_argument("--verify", action="store_true", help="compare tensors and log-probs with transformers")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> int:
    """Export and return the exit code. Raises UserError."""
    set_unless_given(EXACT_FP32_VARIABLES)
    files.require_absent_or_empty(options.out, "--out")
    from eaopd_megatron.checkpoint import convert as conversion

    conversion.export_checkpoint(options.checkpoint, options.out, verify=options.verify, log=log_rank0)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; a user's error is one line."""
    return run_entrypoint(lambda: convert(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
