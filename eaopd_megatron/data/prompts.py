"""Problems → prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eaopd_megatron.data.samples import Prompt
from eaopd_megatron.errors import RecipeError, UserError


class PromptBuilder:
    """Turns problems into token ids, once, with the student's tokenizer: the same ids for student and teacher.

    template: `chat`, the tokenizer's own with thinking off (Qwen3: the assistant's turn begins with an empty think
    block); `base`, question and answer as plain text, for models that know no chat; `raw`, the problem alone. suffix: a
    line after the problem.

    max_tokens: longer prompts are left out; limit: what sets it, for the message where none is left.

    teachers: names of which each problem has one under teacher_field; of a single one all problems are.
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
        if self.suffix:
            text = f"{text}\n{self.suffix}"
        if self.template == "base":
            text = f"Question: {text}\nAnswer:"
        elif self.template == "chat":
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def build(self, problems: Sequence[dict[str, Any]], source: str) -> tuple[list[Prompt], int]:
        """The prompts, and how many problems were left out because they are longer than `max_tokens` tokens."""
        prompts: list[Prompt] = []
        dropped = 0
        for number, problem in enumerate(problems, 1):
            text = problem.get(self.field)
            if not isinstance(text, str) or not text:
                keys = ", ".join(problem) or "none"
                raise UserError(f"{source}, record {number}: no text under {self.field!r}; its keys are {keys}")
            ids = self.token_ids(text)
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
        named = problem.get(self.teacher_field)
        if named not in self.teachers:
            found = (
                f"{self.teacher_field!r} is {named!r}"
                if self.teacher_field in problem
                else (f"there is no {self.teacher_field!r} (data.teacher_field)")
            )
            raise UserError(f"{where}: {found}; the recipe's teachers are {', '.join(self.teachers)}")
        return str(named)
