"""`eaopd doctor RECIPE`: whether a student and its teacher end a response in the same way.

What a handful of responses shows of it (`trial`), in words and as a verdict.
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

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.launch.local_ranks import launch_ranks, student_world_size
from eaopd_megatron.models.supported import check_recipe_models
from eaopd_megatron.reporting.alerts import TERMINAL_LOGPROB_FLOOR

RESULTS_FILE = "eos_check.json"
"""What the ranks write into their temporary folder."""
ResponseEnd = tuple[int, float, float]
"""Of a response that stopped: its last token, the teacher's log-prob of it under the recipe's terminal map, and under
none (nan: it is not among the top-k). Nats."""


def check_eos(recipe: str, overrides: Sequence[str]) -> int:
    """Starts the recipe's ranks on this host and prints what they find. 1 where a pair does not agree, or they fail."""
    check_recipe_models(load_recipe(recipe, overrides))  # a wrong key leaves no folder
    scratch = tempfile.mkdtemp(prefix="eaopd-doctor-")
    changed = [*overrides, f"run.folder={scratch}", "evaluation.benchmarks=[]"]
    loaded = load_recipe(recipe, changed)
    if code := launch_ranks(["eos-check", recipe, *changed], student_world_size(loaded.student)):
        return code  # errors name logs in the folder
    found = [EosCheckResult(**one) for one in json.loads((Path(scratch) / RESULTS_FILE).read_text())]
    shutil.rmtree(scratch, ignore_errors=True)
    student = HfFolder.open(loaded.student.model, "student.model")
    texts = student.tokenizer().convert_ids_to_tokens(list(range(student.vocab_size)))
    for agreement in found:
        print("\n".join(agreement.lines(texts)))
    return int(any(agreement.disagrees for agreement in found))


@dataclass(frozen=True)
class EosCheckResult:
    """Of one teacher. student_id, teacher_id: the first end ids of the two (-1: none)."""

    name: str
    model: str
    terminal_map: str  # the recipe's
    student_id: int
    teacher_id: int
    prompts: int
    limit: int  # tokens of a response
    ends: Sequence[ResponseEnd]

    @property
    def mean(self) -> float:
        """Of the log-probs under the map; nan where nothing stopped."""
        return _mean([mapped for _, mapped, _ in self.ends])

    @property
    def mapped(self) -> bool:
        """Whether the map changes anything."""
        return self.terminal_map != "none" and self.student_id != self.teacher_id

    @property
    def disagrees(self) -> bool:
        return self.mean < TERMINAL_LOGPROB_FLOOR

    def lines(self, texts: Sequence[str]) -> Iterator[str]:
        """What is seen, and the verdict. texts: of each token id."""
        yield f"teacher {f'{self.name}: ' if self.name else ''}{self.model}"
        count, share = len(self.ends), len(self.ends) / max(1, self.prompts)
        yield f"  {count} of {self.prompts} responses ({share:.0%}) stopped within {self.limit} tokens"
        if not self.ends:
            yield "  nothing can be said of how the pair stops: raise rollout.max_response_tokens, or train on"
            return
        for token, times in Counter(token for token, _, _ in self.ends).most_common():
            yield f"  ended with {token} {texts[token]!r}: {times}"
        kind = self.terminal_map if self.mapped else "none: both end with the same id" if self.same else "none"
        yield f"  the teacher's log-prob of the end (terminal_map {kind}): {_shown([m for _, m, _ in self.ends])}"
        if self.mapped:
            known = [plain for _, _, plain in self.ends if not math.isnan(plain)]
            shown = _shown(known) if known else "not known from its top-k"
            yield f"  without a map: {shown}" + (f" (known of {len(known)})" if 0 < len(known) < count else "")
        yield f"  {self._verdict(texts)}"

    @property
    def same(self) -> bool:
        """Whether the two have the same end id."""
        return self.student_id == self.teacher_id

    def _verdict(self, texts: Sequence[str]) -> str:
        if not self.disagrees:
            return "the pair agrees on how to stop"
        key = f"teachers.{self.name}" if self.name else "teacher"
        plain = [plain for _, _, plain in self.ends if not math.isnan(plain)]
        if self.mapped and len(plain) == len(self.ends) and _mean(plain) >= TERMINAL_LOGPROB_FLOOR:
            remedy = f"set {key}.terminal_map=none: the student ends as the teacher does"
        elif not self.mapped and not self.same:
            remedy = f"set {key}.terminal_map=swap: the teacher ends with {self.teacher_id} {texts[self.teacher_id]!r}"
        else:
            remedy = "look at eos_token_id in both generation_config.json, and at data.template"
        return f"the pair does not agree on how to stop (below {TERMINAL_LOGPROB_FLOOR:g} nats): {remedy}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _shown(values: Sequence[float]) -> str:
    return f"mean {_mean(values):.2f}, lowest {min(values):.2f}"
