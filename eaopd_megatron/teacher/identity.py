"""What a recipe's separate teacher is: what its service says of itself, and what the student's ranks ask for."""

from __future__ import annotations

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.tree import Teacher
from eaopd_megatron.teacher.terminal import TerminalMap
from eaopd_megatron.teacher.wire import Info


def identity(recipe: Recipe, options: Teacher, student: HfFolder, folder: HfFolder, *, layout: str = "") -> Info:
    """folder: the teacher's. It reads a little of every tensor for the fingerprint. Raises UserError for a folder that
    is not whole."""
    terminal = TerminalMap.between(options.terminal_map, student.eos_ids, folder.eos_ids)
    vocab_size = min(student.vocab_size, folder.vocab_size)
    return Info(
        model=options.model,
        fingerprint=folder.fingerprint,
        signal=recipe.signal(options),
        top_k=min(recipe.objective.build().top_k, vocab_size),
        width=int(folder.config.hidden_size),
        dtype="fp32" if options.precision == "fp32" else "bf16",  # fp8 is the weights'
        vocab_size=vocab_size,
        terminal=(terminal.kind, terminal.student_id, terminal.teacher_id),
        max_tokens=max(
            recipe.train.micro_batch_tokens, recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
        ),
        layout=layout,
    )
