"""Problems → prompts as token ids, the order of the prompts, and seeded random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from eaopd_megatron.data.sources import check_batch, prompt_text
from eaopd_megatron.data.types import Prompt
from eaopd_megatron.errors import RecipeError, UserError


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `key`, such as (seed, "prompts", epoch)."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def seeded_uniforms(count: int, *key: int | str) -> torch.Tensor:
    """Return [count] fp64 in [0, 1)."""
    return torch.rand(count, dtype=torch.float64, generator=seeded_generator(*key))


@dataclass(frozen=True)
class PromptCursor:
    """Epochs over `count` prompts in batches of `batch`, with `shuffle` in a new order each. Iterations and epochs
    count from 0.

    last_batch: "drop" an epoch's last, smaller batch (its prompts wait for another epoch's order) or "keep" it.
    """

    count: int
    batch: int
    seed: int
    shuffle: bool = True
    last_batch: str = "drop"

    def __post_init__(self) -> None:
        check_batch(self.count, self.batch, self.last_batch)

    @property
    def batches_per_epoch(self) -> int:
        return self.count // self.batch if self.last_batch == "drop" else -(-self.count // self.batch)

    def indices(self, iteration: int) -> list[int]:
        """Return the indices of the iteration's prompts."""
        epoch, number = divmod(iteration, self.batches_per_epoch)
        start = number * self.batch
        order = _permutation(self.count, self.seed, epoch) if self.shuffle else list(range(self.count))
        return order[start : start + self.batch]

    def size(self, iteration: int) -> int:
        """Return the number of the iteration's prompts."""
        return min(self.batch, self.count - iteration % self.batches_per_epoch * self.batch)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=seeded_generator(seed, "prompts", epoch)).tolist()


class PromptBuilder:
    """Turns problems into token ids with the student's tokenizer, once: the same ids for student and teacher.

    template: `chat`, the tokenizer's own without thinking (Qwen3: the assistant's turn starts with an empty think
    block); `base`, question and answer as plain text, for models without a chat template; `raw`, only the problem.
    suffix: a line after the problem. max_tokens: longer prompts are dropped; limit: its setting, for messages.
    teachers: each problem names one of them under teacher_field; a single one has all problems.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str,
        suffix: str,
        field: str,
        max_tokens: int,
        teachers: Sequence[str] = ("",),
        teacher_field: str = "teacher",
        limit: str = "data.max_prompt_tokens",
    ) -> None:
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise RecipeError(
                "data.template=chat, but the student's tokenizer has no chat template; use data.template=base or raw"
            )
        self.tokenizer, self.template, self.suffix = tokenizer, template, suffix
        self.field, self.max_tokens, self.limit = field, max_tokens, limit
        self.teachers, self.teacher_field = teachers, teacher_field

    def token_ids(self, text: str) -> list[int]:
        """Return the prompt of a problem's text. A chat template writes its own BOS, the tokenizer that of a text."""
        if self.suffix:
            text = f"{text}\n{self.suffix}"
        if self.template == "base":
            text = f"Question: {text}\nAnswer:"
        elif self.template == "chat":
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        ids = list(self.tokenizer.encode(text, add_special_tokens=self.template != "chat"))
        end = getattr(self.tokenizer, "eos_token", None)
        if len(ids) > 1 and end and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(end):
            ids.pop()  # of a tokenizer with add_eos_token: the response follows
        return ids

    def build(self, problems: Sequence[dict[str, Any]], source: str) -> tuple[list[Prompt], int]:
        """Return the prompts, and the number of problems dropped because they are longer than max_tokens. Raises
        UserError for a record without text or teacher, and if no prompt is left."""
        prompts: list[Prompt] = []
        dropped = 0
        for number, problem in enumerate(problems, 1):
            ids = self.token_ids(prompt_text(problem, self.field, f"{source}, record {number}"))
            if not ids:
                raise UserError(f"{source}, record {number}: the tokenizer gives no token for {problem[self.field]!r}")
            if len(ids) > self.max_tokens:
                dropped += 1
                continue
            teacher = self._teacher(problem, f"{source}, record {number}")
            prompts.append(Prompt(str(problem.get("id", number - 1)), tuple(ids), problem, teacher))
        if not prompts:
            raise UserError(f"{source}: every prompt is longer than {self.max_tokens} tokens ({self.limit})")
        return prompts, dropped

    def _teacher(self, problem: dict[str, Any], where: str) -> str:
        if len(self.teachers) == 1:
            return self.teachers[0]
        name = problem.get(self.teacher_field)
        if name in self.teachers:
            return str(name)
        what = f"there is no {self.teacher_field!r} (data.teacher_field)"
        if self.teacher_field in problem:
            what = f"{self.teacher_field!r} is {name!r}"
        raise UserError(f"{where}: {what}; the recipe's teachers are {', '.join(self.teachers)}")
