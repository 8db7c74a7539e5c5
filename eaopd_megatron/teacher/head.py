"""The output head of a teacher that lives elsewhere: the student's ranks make its distribution from hidden states."""

from __future__ import annotations

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_output_head
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.model import DTYPES
from eaopd_megatron.teacher.terminal import TerminalMap


def load_head(
    folder: HfFolder,
    parallel: Parallel,
    *,
    student_rows: int,
    vocab_size: int,
    precision: str,
    terminal: TerminalMap,
) -> torch.Tensor | None:
    """This rank's rows of the teacher's head in the student's layout and padding [V_padded/tp, h_T], under the terminal
    map; None before the last pipeline stage.

    student_rows: the student's vocabulary without padding. vocab_size: that of both models, beyond which the rows are
    padding. precision: of the teacher's scoring; its hidden states are multiplied in it ("fp8" is of the weights of
    layers alone: the head is bf16 then). Raises UserError where the folder does not hold what its config.json says.
    """
    if not parallel.is_last_stage:
        return None
    head = load_output_head(
        folder,
        tp_rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
        rows=student_rows,
        vocab_size=vocab_size,
        row_map=terminal.row_map(),
    )
    return head.to(parallel.device, DTYPES.get(precision, torch.bfloat16))
