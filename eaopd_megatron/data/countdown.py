"""Countdown: the built-in task, small enough for a laptop and exact enough for measurements.

A problem has three numbers (1..12) and a target (1..99). An answer has two steps and uses each number exactly once::

    use 3 5 7 make 50 :   3 + 7 = 10 ; 5 * 10 = 50 ;

The first step combines two of the numbers; the second combines its result and the third number into the target. Every
value is an integer in 0..99, because a number is one token of a vocabulary of 112. Most problems have several right
answers, so a good model is undecided at some tokens. Only `countdown_tokenizer` needs more than the standard library.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "heldout"]
Operands = tuple[int, int, int]

MAX_OPERAND = 12
MAX_VALUE = 99
OPERATORS = ("+", "-", "*", "/")
EOS_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
COUNTDOWN_VOCABULARY: tuple[str, ...] = (
    *(str(value) for value in range(MAX_VALUE + 1)),
    *OPERATORS,
    *("=", ";", "use", "make", ":"),
    *(EOS_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN),
)
TOKEN_IDS: dict[str, int] = {token: index for index, token in enumerate(COUNTDOWN_VOCABULARY)}
EOS_ID = TOKEN_IDS[EOS_TOKEN]

PROMPT_TOKENS = 7  # every prompt has this length
MAX_RESPONSE_TOKENS = 16  # an answer and its end take 13; the rest lets a model show that it does not stop
HELD_OUT_ONE_IN = 8

_VALUES: dict[str, int] = {str(value): value for value in range(MAX_VALUE + 1)}


def calculate(left: int, operator: str, right: int) -> int | None:
    """Return `left operator right`; None if it is not an integer in 0..99 or the operator is unknown."""
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    elif operator == "/" and right != 0 and left % right == 0:
        value = left // right
    else:
        return None
    return value if 0 <= value <= MAX_VALUE else None


def _steps(one: int, other: int) -> Iterator[tuple[str, int]]:
    """Yield text and value of every valid step that combines two values, in either order."""
    for left, right in {(one, other), (other, one)}:
        for operator in OPERATORS:
            value = calculate(left, operator, right)
            if value is not None:
                yield f"{left} {operator} {right} = {value} ;", value


@lru_cache(maxsize=1)
def _answers() -> dict[tuple[Operands, int], tuple[str, ...]]:
    """Return every solvable problem (numbers ascending, target) with its right answers in alphabetical order."""
    answers: defaultdict[tuple[Operands, int], set[str]] = defaultdict(set)
    for a, b, c in combinations_with_replacement(range(1, MAX_OPERAND + 1), 3):
        for one, other, rest in {(a, b, c), (a, c, b), (b, c, a)}:
            for first_step, middle in _steps(one, other):
                for last_step, target in _steps(middle, rest):
                    if target > 0:
                        answers[(a, b, c), target].add(f"{first_step} {last_step}")
    return {problem: tuple(sorted(texts)) for problem, texts in answers.items()}


@lru_cache(maxsize=2)
def _split(split: str) -> tuple[tuple[str, Operands, int], ...]:
    """Return (id, numbers, target) of a split in the order of the ids' hashes: the first N are a random sample."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    rows = []
    for numbers, target in _answers():
        problem_id = f"{numbers[0]}-{numbers[1]}-{numbers[2]}-makes-{target}"
        digest = int.from_bytes(hashlib.sha256(problem_id.encode()).digest()[:8])
        if (digest % HELD_OUT_ONE_IN == 0) == (split == "heldout"):
            rows.append((digest, problem_id, numbers, target))
    return tuple((problem_id, numbers, target) for _, problem_id, numbers, target in sorted(rows))


def problems(split: Split) -> list[dict[str, Any]]:
    """Return the solvable problems of a split, always in the same order.

    Each is `{"id": str, "numbers": [a, b, c] ascending, "target": int, "problem": the prompt's text}`. One in
    `HELD_OUT_ONE_IN` is held out, chosen by the SHA-256 of its id. Numbers are always ascending, so no held-out problem
    is a reordered training problem. Raises ValueError for an unknown split.
    """
    return [
        {
            "id": problem_id,
            "numbers": list(numbers),
            "target": target,
            "problem": f"use {numbers[0]} {numbers[1]} {numbers[2]} make {target} :",
        }
        for problem_id, numbers, target in _split(split)
    ]


def solve(numbers: list[int] | Operands, target: int) -> list[str]:
    """Return all right answers in alphabetical order, with both orders of commuting operands."""
    a, b, c = sorted(numbers)
    return list(_answers().get(((a, b, c), target), ()))


def check_answer(problem: Mapping[str, Any], response_text: str) -> tuple[bool, str | None]:
    """Return whether a response is exactly a right answer, and the answer's canonical form, None for a wrong one.

    A response is its two steps and nothing else, separated by white space. The canonical form has the operands of + and
    * in ascending order, so that `3 + 7` and `7 + 3` share it. Never raises.
    """
    words = response_text.split()
    if len(words) != 12:
        return False, None
    available = list(problem["numbers"])
    steps = []
    result = None
    for at in (0, 6):
        left_word, operator, right_word, equals, result_word, end = words[at : at + 6]
        left, right, result = _VALUES.get(left_word), _VALUES.get(right_word), _VALUES.get(result_word)
        if left is None or right is None or result is None or (equals, end) != ("=", ";"):
            return False, None
        for value in (left, right):
            if value not in available:
                return False, None
            available.remove(value)
        if calculate(left, operator, right) != result:
            return False, None
        available.append(result)
        if operator in "+*":
            left, right = min(left, right), max(left, right)
        steps.append(f"{left} {operator} {right} = {result} ;")
    return (True, " ".join(steps)) if result == problem["target"] else (False, None)


def supervised_examples(seed: int, split: Split = "train") -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (problem, answer) forever: a uniformly drawn problem, then a uniformly drawn right answer to it."""
    generator = random.Random(seed)
    chosen = problems(split)
    while True:
        problem = chosen[generator.randrange(len(chosen))]
        answers = _answers()[tuple(problem["numbers"]), problem["target"]]
        yield problem, answers[generator.randrange(len(answers))]


def countdown_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer with one token per word of `COUNTDOWN_VOCABULARY`, split at white space, no chat template.

    `decode(ids, skip_special_tokens=True)` returns text for `check_answer`. The padding token serves only batches: no
    model of the pair names it in its config, because transformers zeroes the embedding of a config's `pad_token_id`.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(TOKEN_IDS, unk_token=UNKNOWN_TOKEN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
