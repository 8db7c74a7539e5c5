r"""Mathematical equality of two answers in LaTeX, by math-verify and exact evaluation; runs in math_worker's process.

math-verify parses; what it decides wrongly is decided here first:

- expressions by their values, to 40 digits, at points that are exact numbers: no sign or case gets lost, and nothing
  cancels. math-verify rounds to six places, so that 2.88e-19 equals 2.89e-19; here six significant digits must agree
  where a decimal is involved, and all of them elsewhere;
- sets element by element, and never as a tuple; inequalities as the sets of numbers that they describe;
- equations by the ratio of their two sides' differences, so that `0 = 0` equals no other equation;
- a family such as `\frac{\pi}{2} + k\pi` by its members.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import sympy
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from math_verify.grader import is_assignment_relation, should_treat_as_complex, take_first_relation, take_last_relation
from math_verify.parser import get_last_eq
from sympy import Eq, Expr, FiniteSet, Interval, MatrixBase, Set, Symbol, Tuple
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from eaopd_megatron.evaluation.expressions import (
    expression_key,
    proportional,
    same_expression,
    sample_points,
    value_at,
)

_WORDS = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_SYMBOL = re.compile(r"[A-Za-z]")
_BRACES = re.compile(r"(?:[^\\]*(?:=|\\in)\s*)?\\\{.*\\\}\.?", re.DOTALL)
_LAST_WORDS = re.compile(r"\s*\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\d|\^\{\d\})?\s*$")
_TWO_NUMBERS = re.compile(r"\d\s+\d")


def equal(gold: str, answer: str | None = None, relations: bool = False) -> bool:
    """Return whether an answer equals a gold; without an answer, whether the gold is mathematics, not text.

    relations: a set of numbers may equal a relation, and a column of numbers a tuple. Raise ValueError for a gold of
    which nothing can be parsed.
    """
    golds, strip = _read_gold(gold)
    if answer is None:
        if not golds:
            raise ValueError("nothing was parsed")
        return not isinstance(golds[0], str)
    answers = _read(answer, strip)
    first = [parsed[0] for parsed in (golds, answers) if parsed and not isinstance(parsed[0], str)]
    if "%" not in gold + answer and len(first) == 2:  # 8% equals 8 and 0.08
        verdict = None
        braces = any(_BRACES.fullmatch(text) for text in (gold, answer))
        with contextlib.suppress(Exception):  # of sympy, which raises many; math-verify compares then
            verdict = _same(first[0], first[1], relations, listed=not braces)
        if verdict is not None:
            return verdict
    return bool(verify(golds, answers, allow_set_relation_comp=relations, timeout_seconds=None, raise_on_error=True))


def key(answer: str) -> str | None:
    """Return a text that equal answers share in any notation; None for an answer that is no mathematics."""
    parsed = _read(answer, True)
    return None if not parsed or isinstance(parsed[0], str) else expression_key(parsed[0])


@functools.lru_cache(maxsize=512)
def _read_gold(text: str) -> tuple[list[Any], bool]:
    """Return the parsed gold, and whether letters may be units: never beside a symbol, so 6m is not 6."""
    strip = not _SYMBOL.search(_WORDS.sub("", text))
    return _read(text, strip), strip


def _read(text: str, units: bool) -> list[Any]:
    """Return [expression, text], as math-verify compares them, or [text] for what is no mathematics.

    units: letters after a number may be some; words in \\text{} at the end always are.
    """
    text = _LAST_WORDS.sub("", text) or text
    options = NormalizationConfig(basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="none")
    latex = normalize_latex(text, options)
    for candidate in dict.fromkeys((latex, get_last_eq(latex))):
        if _TWO_NUMBERS.search(_WORDS.sub("x", candidate)):  # the parser adds them, as in a mixed number
            continue
        try:
            parsed = latex2sympy(
                candidate,
                is_real=not should_treat_as_complex(candidate),
                normalization_config=None,
                conversion_config=ConversionConfig(lowercase_symbols=False),
            )
            return [_tidy(parsed), latex]
        except Exception:  # the parser raises many classes, Exception itself among them
            continue
    return [latex] if latex else []


def _tidy(parsed: Any) -> Any:
    """Give symbols one set of assumptions, f(x) a name and negative numbers their real odd roots."""
    if isinstance(parsed, sympy.Basic):
        names = {one: Symbol(one.name, real=True) for one in parsed.atoms(Symbol)}
        parsed = parsed.xreplace({one: other for one, other in names.items() if one != other})
        calls = {one: Symbol(str(one), real=True) for one in parsed.atoms(AppliedUndef)}
        roots = {
            one: sympy.Mul((-1) ** one.exp.p, sympy.Pow(-one.base, one.exp), evaluate=False)
            for one in parsed.atoms(sympy.Pow)
            if one.base.is_number and one.base.is_negative and one.exp.is_Rational and one.exp.q > 1 and one.exp.q % 2
        }
        parsed = parsed.xreplace(calls).xreplace(roots)
    return parsed


def _same(gold: Any, answer: Any, relations: bool = False, listed: bool = False) -> bool | None:
    """Return whether two parsed answers are equal; None: math-verify shall say.

    listed: neither is a set in braces, so a list without brackets may be a tuple.
    """
    gold, answer = _unwrap(gold, answer)
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        return _same_equation(gold, answer)
    if _is_condition(gold) or _is_condition(answer):
        return _same_condition(gold, answer, relations)
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return same_expression(gold, answer)
    if relations and {isinstance(gold, MatrixBase), isinstance(answer, MatrixBase)} == {True, False}:
        pair = (gold, answer)
        gold, answer = (Tuple(*one) if isinstance(one, MatrixBase) and 1 in one.shape else one for one in pair)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(_equal, gold, answer))
    if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
        return _match(gold.args, answer.args, functools.partial(_equal, relations=relations))
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        ends = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return ends and _equal(gold.start, answer.start) and _equal(gold.end, answer.end)
    lists = (FiniteSet, Tuple, Interval)
    if isinstance(gold, lists) and isinstance(answer, lists):
        parts = _elements(gold), _elements(answer)
        if len(parts[0]) != len(parts[1]) or not parts[0]:
            return False
        if not listed and isinstance(gold, FiniteSet) != isinstance(answer, FiniteSet):
            return False
        return all(_equal(one, other, relations) for one, other in zip(*parts, strict=True))
    if isinstance(gold, Set) and isinstance(answer, Set):
        return _same_set(gold, answer)
    return None


def _equal(gold: Any, answer: Any, relations: bool = False) -> bool:
    """Return `_same` of parts, or what math-verify says."""
    verdict = _same(gold, answer, relations)
    if verdict is None:
        verdict = verify([gold], [answer], timeout_seconds=None, raise_on_error=True)
    return bool(verdict)


def _unwrap(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Drop `x =` and `x in` where only one of the two has it, and all but the ends of `x = ... = 5`."""
    pair = []
    for one in (gold, answer):
        if is_assignment_relation(one):
            one = Eq(take_first_relation(one).lhs, take_last_relation(one).rhs, evaluate=False)
        elif isinstance(one, Eq) and isinstance(one.rhs, Symbol) and one.lhs.is_number:
            one = Eq(one.rhs, one.lhs, evaluate=False)
        pair.append(one)
    if not all(isinstance(one, Eq) and isinstance(one.rhs, Set) for one in pair):
        pair = [one.rhs if isinstance(one, Eq) and isinstance(one.rhs, Set) else one for one in pair]
    named = [isinstance(one, Eq) for one in pair]
    if named == [True, False] and is_assignment_relation(pair[0]):
        pair[0] = pair[0].rhs
    elif named == [False, True] and not _is_condition(pair[0]):
        pair[1] = pair[1].rhs
    return tuple(pair)


def _elements(one: Any) -> Sequence[Any]:
    """Return what a list, tuple or pair (a, b), which is parsed as an open interval, consists of, as it was written."""
    if isinstance(one, Interval):
        return (one.start, one.end) if one.left_open and one.right_open else ()
    return cast(Sequence[Any], getattr(one, "_unsorted_args", None) or getattr(one, "args", ()))


def _match(golds: Sequence[Any], answers: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Return whether the elements of two sets are pairwise equal."""
    rest = list(answers)
    for one in golds:
        found = next((other for other in rest if same(one, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return not rest


def _same_equation(gold: Any, answer: Any) -> bool | None:
    """Return whether one equation is a multiple of the other; where it is none, math-verify may solve them."""
    if any(isinstance(one, Set) for one in (gold.rhs, answer.rhs)):
        return bool(gold.lhs == answer.lhs) and _equal(gold.rhs, answer.rhs)
    if not all(isinstance(one, Expr) for one in (*gold.args, *answer.args)):
        return None
    calls = [re.fullmatch(r"(\w+)\((\w+)\)", str(one.lhs)) for one in (gold, answer)]
    if calls[0] and calls[1] and calls[0][1] == calls[1][1] and calls[0][2].isalpha() and calls[1][2].isalpha():
        variables = [Symbol(call[2], real=True) for call in calls if call]  # f(t) = 2t is f(x) = 2x
        return _equal(gold.rhs, answer.rhs.xreplace({variables[1]: variables[0], variables[0]: variables[1]}))
    if all(isinstance(one.lhs, Symbol) and one.lhs not in one.rhs.free_symbols for one in (gold, answer)):
        swapped = gold.lhs == answer.rhs and gold.rhs == answer.lhs
        if gold.lhs == answer.lhs or swapped:
            return swapped or same_expression(gold.rhs, answer.rhs)
    verdict = proportional(gold.lhs - gold.rhs, answer.lhs - answer.rhs)
    if verdict is False and gold.free_symbols == answer.free_symbols:
        solutions = [sympy.solve(one, one.free_symbols) for one in (gold, answer)]
        return None if all(solutions) else False  # without any, all equations would be equal
    return verdict


def _is_condition(one: Any) -> bool:
    """Return whether something is an inequality, or a list with one."""
    if isinstance(one, FiniteSet):
        return any(_is_condition(part) for part in one.args)
    return (
        isinstance(one, (Relational, sympy.logic.boolalg.BooleanFunction))
        and not isinstance(one, Eq)
        and one not in (True, False)
    )


def _same_condition(gold: Any, answer: Any, relations: bool) -> bool | None:
    """Compare inequalities as sets of numbers, and those in several symbols one by one."""
    if _is_condition(gold) and not _is_condition(answer) and not isinstance(answer, Set):
        return False
    if _is_condition(answer) and not _is_condition(gold) and not (relations and isinstance(gold, Set)):
        return False
    symbols = gold.free_symbols | answer.free_symbols
    if len(symbols) == 1 and all(len(one.free_symbols) == 1 for one in (gold, answer) if _is_condition(one)):
        sets = [_solution_set(one) for one in (gold, answer)]
        return None if None in sets else _same_set(*sets)
    chains = [sorted(_inequalities(one), key=str) for one in (gold, answer)]
    if not all(chains):
        return None
    return len(chains[0]) == len(chains[1]) and _match(chains[0], chains[1], _same_side)


def _inequalities(one: Any) -> list[Any]:
    """Return the single relations of a chain or list, each as `<`, `<=`, `=` or `!=`."""
    parts = _elements(one) if isinstance(one, FiniteSet) or not isinstance(one, Relational) else [one]
    if not all(isinstance(part, Relational) and all(isinstance(side, Expr) for side in part.args) for part in parts):
        return []
    return [part.reversed if isinstance(part, (sympy.Gt, sympy.Ge)) else part for part in parts]


def _same_side(one: Any, other: Any) -> bool:
    """Return whether two relations are of one kind, and one a multiple of the other, of inequalities a positive one."""
    if type(one) is not type(other):
        return False
    differences = one.lhs - one.rhs, other.lhs - other.rhs
    if not proportional(*differences):
        return False
    symbols = sorted(differences[0].free_symbols, key=str)
    values = [value_at(difference, next(iter(sample_points(symbols, False)))) for difference in differences]
    return bool(isinstance(one, (Eq, sympy.Ne)) or values[0] / values[1] > 0)


def _solution_set(one: Any) -> Any:
    """Return the real numbers that a relation describes, or several: all of them if that is possible, else any."""
    if isinstance(one, FiniteSet):
        sets = [_solution_set(part) for part in _elements(one)]
        if None in sets:
            return None
        both = sympy.Intersection(*sets).doit()
        return both if both is not sympy.S.EmptySet else sympy.Union(*sets).doit()
    if isinstance(one, Eq) and isinstance(one.rhs, Set):
        return one.rhs
    try:
        return one if isinstance(one, Set) else one.as_set()
    except (NotImplementedError, TypeError, ValueError):
        return None


def _same_set(gold: Any, answer: Any) -> bool | None:
    """Compare unions of intervals and numbers piece by piece."""
    pieces = []
    for one in (gold.doit(), answer.doit()):
        parts = one.args if isinstance(one, sympy.Union) else (one,)
        if not all(isinstance(part, (Interval, FiniteSet)) for part in parts):
            return True if gold.doit() == answer.doit() else None
        intervals = [part for part in parts if isinstance(part, Interval)]
        numbers = [number for part in parts if isinstance(part, FiniteSet) for number in part.args]
        pieces.append((intervals, numbers))
    return all(_match(first, second, _equal) for first, second in zip(*pieces, strict=True))
