"""`eaopd doctor RECIPE`: whether student and teacher end their responses with the same token.

Starts the ranks (`eos_check_rank`), which generate and score a few responses, and prints a verdict per teacher.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.config import load_recipe
from eaopd_megatron.launch.local_ranks import launch_ranks, student_world_size
from eaopd_megatron.models.supported import check_recipe_models
from eaopd_megatron.reporting.alerts import TERMINAL_LOGPROB_FLOOR

RESULTS_FILE = "eos_check.json"
"""File that the ranks write into their temporary folder."""
ResponseEnd = tuple[int, float, float]
"""Of a response that ended with EOS: its last token, and the teacher's log-prob of it (nats) with the recipe's terminal
map and without one (nan if outside the top-k)."""


def check_eos(recipe: str, overrides: Sequence[str]) -> int:
    """Start the recipe's ranks on this host and print their results. Return 1 if a pair disagrees or a rank fails."""
    check_recipe_models(load_recipe(recipe, overrides))  # before the folder is made
    scratch = tempfile.mkdtemp(prefix="eaopd-doctor-")
    changes = [*overrides, f"run.folder={scratch}", "evaluation.benchmarks=[]"]
    loaded = load_recipe(recipe, changes)
    if code := launch_ranks(["eos-check", recipe, *changes], student_world_size(loaded.student)):
        return code  # keep the folder: errors name logs in it
    results = [EosCheckResult(**one) for one in json.loads((Path(scratch) / RESULTS_FILE).read_text())]
    shutil.rmtree(scratch, ignore_errors=True)
    from eaopd_megatron.checkpoint.hf_folder import HfFolder  # imports torch

    student = HfFolder.open(loaded.student.model, "student.model")
    texts = student.tokenizer().convert_ids_to_tokens(list(range(student.vocab_size)))
    for result in results:
        print("\n".join(result.lines(texts)))
    return int(any(result.disagrees for result in results))


@dataclass(frozen=True)
class EosCheckResult:
    """The responses scored by one teacher. student_id, teacher_id: first EOS id of each (-1: none)."""

    name: str
    model: str
    terminal_map: str  # from the recipe
    student_id: int
    teacher_id: int
    prompts: int
    limit: int  # maximum response length in tokens
    ends: Sequence[ResponseEnd]

    @property
    def mean(self) -> float:
        """Mean log-prob with the map; nan if no response stopped."""
        return _mean([mapped for _, mapped, _ in self.ends])

    @property
    def is_mapped(self) -> bool:
        """Whether the terminal map changes anything."""
        return self.terminal_map != "none" and self.student_id != self.teacher_id

    @property
    def disagrees(self) -> bool:
        return self.mean < TERMINAL_LOGPROB_FLOOR

    def lines(self, texts: Sequence[str]) -> Iterator[str]:
        """Yield the report, with the verdict as its last line. texts: text of each token id."""
        yield f"teacher {f'{self.name}: ' if self.name else ''}{self.model}"
        count, share = len(self.ends), len(self.ends) / max(1, self.prompts)
        yield f"  {count} of {self.prompts} responses ({share:.0%}) stopped within {self.limit} tokens"
        if not self.ends:
            yield "  no response stopped, so the pair cannot be judged: raise rollout.max_response_tokens, or train on"
            return
        for token, times in Counter(token for token, _, _ in self.ends).most_common():
            yield f"  ended with {token} {texts[token]!r}: {times}"
        kind = self.terminal_map if self.is_mapped else "none: both end with the same id" if self.same_id else "none"
        yield f"  the teacher's log-prob of the end (terminal_map {kind}): {_summary([m for _, m, _ in self.ends])}"
        if self.is_mapped:
            known = [plain for _, _, plain in self.ends if not math.isnan(plain)]
            summary = _summary(known) if known else "not known from its top-k"
            yield f"  without a map: {summary}" + (f" (known of {len(known)})" if 0 < len(known) < count else "")
        yield f"  {self._verdict(texts)}"

    @property
    def same_id(self) -> bool:
        return self.student_id == self.teacher_id

    def _verdict(self, texts: Sequence[str]) -> str:
        if not self.disagrees:
            return "the pair agrees on how to stop"
        key = f"teachers.{self.name}" if self.name else "teacher"
        plain = [plain for _, _, plain in self.ends if not math.isnan(plain)]
        if self.is_mapped and len(plain) == len(self.ends) and _mean(plain) >= TERMINAL_LOGPROB_FLOOR:
            remedy = f"set {key}.terminal_map=none: the student ends as the teacher does"
        elif not self.is_mapped and not self.same_id:
            remedy = f"set {key}.terminal_map=swap: the teacher ends with {self.teacher_id} {texts[self.teacher_id]!r}"
        else:
            remedy = "look at eos_token_id in both generation_config.json, and at data.template"
        return f"the pair does not agree on how to stop (below {TERMINAL_LOGPROB_FLOOR:g} nats): {remedy}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _summary(values: Sequence[float]) -> str:
    return f"mean {_mean(values):.2f}, lowest {min(values):.2f}"
