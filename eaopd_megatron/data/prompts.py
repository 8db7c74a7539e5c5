"""Problems → prompts as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaopd_megatron.data import countdown
from eaopd_megatron.data.samples import Prompt
from eaopd_megatron.errors import RecipeError, UserError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line. Raises UserError with the number of a broken line."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: no valid JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: a JSON object was expected, not {type(row).__name__}")
                rows.append(row)
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not rows:
        raise UserError(f"{path}: the data file is empty")
    return rows


def load_problems(source: str, split: str) -> list[dict[str, Any]]:
    """Problems of `countdown` (split train or heldout), of a .jsonl file, or of `hub:owner/name[:config]`."""
    if source == "countdown":
        return countdown.problems("train" if split == "train" else "heldout")
    if source.startswith("hub:"):
        return _hub(source, split)
    if source.endswith(".jsonl"):
        return read_jsonl(Path(source))
    raise RecipeError(f"data source {source!r}: expected countdown, a .jsonl file, or hub:owner/name[:config]")


def _hub(source: str, split: str) -> list[dict[str, Any]]:
    import datasets

    name, _, config = source.removeprefix("hub:").partition(":")
    try:
        return [dict(row) for row in datasets.load_dataset(name, config or None, split=split)]
    except Exception as error:  # the library raises a different class for every cause
        raise UserError(f"data source {source}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


class PromptBuilder:
    """Applies the chat template (thinking off: an empty think block) or none, once, with the student's tokenizer.

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
    ) -> None:
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise RecipeError(
                "data.template=chat, but the student's tokenizer has no chat template; use data.template=raw"
            )
        self.tokenizer, self.template, self.suffix = tokenizer, template, suffix
        self.field, self.max_tokens = field, max_tokens
        self.teachers, self.teacher_field = teachers, teacher_field

    def token_ids(self, text: str) -> list[int]:
        if self.suffix:
            text = f"{text}\n{self.suffix}"
        if self.template == "raw":
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))

    def build(self, problems: Sequence[dict[str, Any]], source: str) -> tuple[list[Prompt], int]:
        """The prompts, and how many problems were left out because they are longer than `max_tokens`."""
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
            raise UserError(f"{source}: every prompt is longer than data.max_prompt_tokens={self.max_tokens}")
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
