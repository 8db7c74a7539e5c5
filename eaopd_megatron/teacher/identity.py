<<<<<<< HEAD
"""What a separate teacher is, by the recipe: what the service says of itself and what its clients compare that with."""
=======
"""What a recipe's separate teacher is: what its service says of itself, and what the student's ranks ask for."""
>>>>>>> main

from __future__ import annotations

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
<<<<<<< HEAD
from eaopd_megatron.config.tree import Teacher as Options
from eaopd_megatron.megatron.model import DTYPES
=======
from eaopd_megatron.config.tree import Teacher
>>>>>>> main
from eaopd_megatron.teacher.terminal import TerminalMap
from eaopd_megatron.teacher.wire import Info


<<<<<<< HEAD
def describe(recipe: Recipe, options: Options, student: HfFolder, folder: HfFolder, layout: str = "") -> Info:
    """The recipe's teacher of these options, whose folder this is. layout: of its ranks, for messages.

    Its vocabulary is the smaller of the two. Raises UserError for a folder without whole weights.
    """
    terminal = TerminalMap.between(options.terminal_map, student.eos_ids, folder.eos_ids)
    vocab_size = min(student.vocab_size, folder.vocab_size)
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
=======
def identity(recipe: Recipe, options: Teacher, student: HfFolder, folder: HfFolder, *, layout: str = "") -> Info:
    """folder: the teacher's. It reads a little of every tensor for the fingerprint. Raises UserError for a folder that
    is not whole."""
    terminal = TerminalMap.between(options.terminal_map, student.eos_ids, folder.eos_ids)
    vocab_size = min(student.vocab_size, folder.vocab_size)
>>>>>>> main
    return Info(
        model=options.model,
        fingerprint=folder.fingerprint,
        signal=recipe.signal(options),
        top_k=min(recipe.objective.build().top_k, vocab_size),
        width=int(folder.config.hidden_size),
<<<<<<< HEAD
        dtype=options.precision if options.precision in DTYPES else "bf16",
        vocab_size=vocab_size,
        terminal=(terminal.kind, terminal.student_id, terminal.teacher_id),
        max_tokens=max(recipe.train.micro_batch_tokens, longest),
=======
        dtype="fp32" if options.precision == "fp32" else "bf16",  # fp8 is the weights'
        vocab_size=vocab_size,
        terminal=(terminal.kind, terminal.student_id, terminal.teacher_id),
        max_tokens=max(
            recipe.train.micro_batch_tokens, recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens
        ),
>>>>>>> main
        layout=layout,
    )
