"""Convert a Hugging Face folder into a Megatron-Core checkpoint (torch_dist) that loads at any layout.

    python tools/hf_to_mcore.py --hf DIR --out DIR [--tensor-parallel N] [--pipeline-parallel N] [--expert-parallel N]
                                [--verify] [--dry-run]

Starts the layout's ranks on this host, or joins those of torchrun or srun. The checkpoint includes configuration and
tokenizer, so tools/mcore_to_hf.py needs nothing else.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.launch import local_ranks as launch
from eaopd_megatron.launch.entrypoint import run_entrypoint
from eaopd_megatron.models.supported import check_local_model
from eaopd_megatron.utils import files
from eaopd_megatron.utils.gpu_environment import EXACT_FP32_VARIABLES, set_unless_given
from eaopd_megatron.utils.lifetime import die_with_parent
from eaopd_megatron.utils.log import log_rank0

KINDS = ("tensor", "pipeline", "expert")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face folder into a Megatron-Core checkpoint", allow_abbrev=False
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder, or a hub id owner/name")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="checkpoint folder, created when complete"
    )
    for kind in KINDS:
        parser.add_argument(f"--{kind}-parallel", type=int, default=1, metavar="N", help="number of ranks (default 1)")
    parser.add_argument("--verify", action="store_true", help="compare tensors and log-probs with transformers")
    parser.add_argument("--dry-run", action="store_true", help="print the parameter mapping without writing")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Import in this process or on ranks and return the exit code. Raises UserError."""
    set_unless_given(EXACT_FP32_VARIABLES)  # for --verify, here and in the ranks
    sizes = {kind: getattr(options, f"{kind}_parallel") for kind in KINDS}
    for kind, size in sizes.items():
        if size < 1:
            raise UserError(f"--{kind}-parallel: {size} ranks cannot be; give 1 or more")
    ranks = sizes["pipeline"] * math.lcm(sizes["tensor"], sizes["expert"])  # experts are sharded over a stage's ranks
    is_rank = launch.is_started_rank()
    layout = ParallelLayout(
        tensor_parallel=sizes["tensor"],
        sequence_parallel=sizes["tensor"] > 1,  # does not change the weights; experts need it
        pipeline_parallel=sizes["pipeline"],
        expert_parallel=sizes["expert"],
    )
    if not is_rank:
        check_local_model(options.hf, layout, "--hf")
    if not is_rank and not options.dry_run:
        files.require_absent_or_empty(options.out, "--out")
        HfFolder.open(options.hf, "--hf").check_tensors()  # before a rank starts; downloads once
        if ranks > 1:
            return launch.launch_ranks(arguments, ranks, command=(sys.executable, str(Path(__file__).resolve())))
    from eaopd_megatron.checkpoint import convert as conversion
    from eaopd_megatron.distributed import parallel_state as groups

    if options.dry_run:
        for line in conversion.describe_conversion(conversion.check_import(options.hf, layout), layout):
            log_rank0(line)
    elif is_rank:
        os.environ |= launch.rank_environment()
        parallel, _ = groups.init_distributed(layout)
        conversion.import_folder(options.hf, options.out, parallel, verify=options.verify, log=log_rank0)
        groups.shutdown_distributed()
    else:
        with conversion.single_process_group() as parallel:
            conversion.import_folder(options.hf, options.out, parallel, verify=options.verify, log=log_rank0)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command; a user's error is one line."""
    return run_entrypoint(lambda: convert(parse(arguments), arguments))


if __name__ == "__main__":
    die_with_parent()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a failed rank must not wait for the others in the destructors of its process groups
