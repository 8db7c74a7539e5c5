"""Values of expressions: whether two are equal or proportional, and a text that equal ones share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from sympy import Expr, Interval, MatrixBase, Rational, Symbol, Tuple
from sympy.core.alphabets import greeks

_DIGITS = 40
_EXACT, _DECIMAL = 1e-30, 2e-6  # relative tolerances
_INTEGER_FUNCTIONS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial, sympy.Sum, sympy.Product)
_SMALL = sympy.Float("1e-100")
_NO_NUMBERS = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
_FAMILY = Symbol("hat{z}", real=True)  # so named by `notation.rewrite`


def same_expression(gold: Any, answer: Any) -> bool | None:
    """Return whether two expressions have the same value wherever both have one; None if that cannot be found out."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if any(map(_is_word, (gold, answer))) and gold != answer:
        return None  # perhaps against the product of its letters
    if all(isinstance(one, Symbol) for one in (gold, answer)):
        return bool(gold == answer)
    decimal = gold.has(sympy.Float) or answer.has(sympy.Float)
    if decimal and not symbols:
        exact = [sympy.nsimplify(one, rational=True) for one in (gold, answer)]
        first, second = value_at(exact[0], {}), value_at(exact[1], {})
        unclear = first is None or second is None or _close(first, second, _DECIMAL)
        return None if unclear else False  # math-verify demands six places, too
    signed = gold.has(sympy.Abs) != answer.has(sympy.Abs)
    gold, answer = gold.doit(), answer.doit()
    if any(one.has(*_NO_NUMBERS) for one in (gold, answer)) or all(one.is_Rational for one in (gold, answer)):
        return bool(gold == answer)
    gold, answer = (sympy.nsimplify(one, rational=True) if decimal else one for one in (gold, answer))
    if not symbols and (verdict := _same_small_number(gold, answer)) is not None:
        return verdict
    verdict = _agree_at_points(gold, answer, symbols, _DECIMAL if decimal else _EXACT, signed)
    if not verdict and _FAMILY in symbols:
        return _same_family(gold, answer)
    return verdict


def _same_small_number(gold: Any, answer: Any) -> bool | None:
    """Compare numbers of which one is 0 or too small to be told from it; None for others."""
    values = [value_at(one, {}) for one in (gold, answer)]
    if None in values or all(abs(value) > _SMALL for value in values):
        return None
    return bool(sympy.simplify(gold - answer) == 0)


def _is_word(one: Any) -> bool:
    return isinstance(one, Symbol) and len(one.name) > 1 and one.name.isalpha() and one.name.lower() not in greeks


def _agree_at_points(gold: Any, answer: Any, symbols: Sequence[Any], tolerance: float, signed: bool) -> bool | None:
    """signed: one of the two is written with an absolute value."""
    imaginary = {Symbol("i", real=True): sympy.I}
    symbols = [one for one in symbols if one not in imaginary]
    alternating = any(one.base.is_negative and one.exp.free_symbols for one in _powers(gold, answer))
    whole = alternating or gold.has(*_INTEGER_FUNCTIONS) or answer.has(*_INTEGER_FUNCTIONS)
    compared = 0
    for number, point in enumerate(sample_points(symbols, whole)):
        point |= imaginary
        if number >= 4 and not whole:  # roots and logarithms of negative numbers have no value
            real = [_is_real_there(one, point) for one in (gold, answer)]
            if signed and real[0] != real[1]:
                return False  # ln |x| has more values than ln x
            if not all(real):
                continue
        values = value_at(gold, point), value_at(answer, point)
        if None in values:
            continue
        compared += 1
        if not _close(*values, tolerance):
            return False
    return True if compared >= min(2, 1 + len(symbols)) else None


def sample_points(symbols: Sequence[Any], whole: bool) -> Iterable[dict[Any, Any]]:
    """Yield points without a pattern: four of positive numbers, then four of both signs; whole ones: eight."""
    if not symbols:
        yield {}
        return
    for i in range(8):
        values = [(2 + 5 * i + 7 * j + i * j) % 13 + 1 + (i + j) // 13 for j in range(len(symbols))]
        if not whole:
            signs = [-1 if i >= 4 and (i + j) % 2 == 0 else 1 for j in range(len(symbols))]
            values = [
                Rational(s * v * (7 + 2 * j), 11 + 3 * i) for j, (s, v) in enumerate(zip(signs, values, strict=True))
            ]
        yield dict(zip(symbols, map(sympy.sympify, values), strict=True))


def _powers(*expressions: Any) -> set[Any]:
    return set().union(*(one.atoms(sympy.Pow) for one in expressions))


def _is_real_there(expression: Any, point: dict[Any, Any]) -> bool:
    """Return whether all roots and logarithms in an expression have positive arguments at a point."""
    arguments = [one.base for one in _powers(expression) if not one.exp.is_integer]
    arguments += [one.args[0] for one in expression.atoms(sympy.log)]
    values = [value_at(one, point) for one in arguments]
    return all(value is not None and value.is_real and value >= 0 for value in values)


def value_at(expression: Any, point: dict[Any, Any]) -> Any:
    """Return the finite number that an expression is at a point; None if there is none."""
    sums = expression.has(sympy.Sum, sympy.Product)
    value = expression.subs(point).doit() if sums else expression
    value = value.evalf(_DIGITS, subs=None if sums else point, maxn=400)
    number = value.is_number and value.is_finite and value.as_real_imag()
    return value if number and all(part.is_Number for part in number) else None


def _close(one: Any, other: Any, tolerance: float) -> bool:
    return bool(abs(one - other) <= tolerance * max(abs(one), abs(other)) + _SMALL)


def _same_family(gold: Any, answer: Any) -> bool | None:
    """Return whether {a + b z: z an integer} is the same set for two expressions."""
    steps = [one.expand().coeff(_FAMILY) for one in (gold, answer)]
    starts = [one.expand().coeff(_FAMILY, 0) for one in (gold, answer)]
    if any(one.free_symbols for one in (*steps, *starts)) or 0 in steps:
        return False
    ratio, shift = (
        sympy.nsimplify(sympy.simplify(one)) for one in (steps[0] / steps[1], (starts[0] - starts[1]) / steps[0])
    )
    return bool(ratio in (1, -1) and shift.is_integer)


def proportional(gold: Any, answer: Any) -> bool:
    """Return whether the ratio of two expressions is a number other than 0."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    ratios = []
    for point in list(sample_points(symbols, False))[:4]:
        values = value_at(gold, point), value_at(answer, point)
        if None in values or any(abs(value) < 1e-30 for value in values):
            return False
        ratios.append(values[0] / values[1])
    return all(_close(one, ratios[0], _EXACT if not gold.has(sympy.Float) else _DECIMAL) for one in ratios)


def expression_key(one: Any) -> str:
    """Write numbers by their values, so that equal ones have one text."""
    if isinstance(one, Expr):
        one = one.doit()
        symbols = sorted(one.free_symbols, key=str)
        if one.is_Rational or one.has(*_NO_NUMBERS):
            return str(one)
        values = [value_at(one, point) for point in list(sample_points(symbols, False))[:2]]
        if None in values:
            return str(one)
        exact = [sympy.nsimplify(value, rational=True, tolerance=1e-30) for value in values if not symbols]
        if exact and exact[0].is_Rational and exact[0].q < 10**6:
            return str(exact[0])
        names = ",".join(map(str, symbols))
        return f"{names}:" * bool(names) + " ".join(str(value.evalf(12, chop=1e-30)) for value in values)
    if isinstance(one, sympy.Eq) and isinstance(one.lhs, Symbol):
        return expression_key(one.rhs)
    if isinstance(one, sympy.FiniteSet):
        return "{" + ", ".join(sorted(map(expression_key, one.args))) + "}"
    if isinstance(one, (Tuple, MatrixBase)):
        return "(" + ", ".join(map(expression_key, one)) + ")"
    if isinstance(one, Interval):
        return (
            "[("[bool(one.left_open)]
            + f"{expression_key(one.start)}, {expression_key(one.end)}"
            + "])"[bool(one.right_open)]
        )
    return str(one)
