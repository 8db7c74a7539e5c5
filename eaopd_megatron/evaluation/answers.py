r"""Parses answers: boxes, lists, exact numbers, and the lenient comparison of answers in different notation.

math-verify takes `4.5e33` for 4.5 times Euler's number plus 33, `n!^2` for nothing, and a list of names for text. The
lenient comparison parses numbers exactly (`4.5 \times 10^{33} \text{ erg/s}` is `4.5e33`, and `2.88e-19` is not
`2.89e-19`), drops a name before `=`, a base and units after a number, takes `x > 2` for `(2, \infty)` and radians for
degrees, and compares lists answer by answer. What strict and lenient mean is said in grading.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\f?box(?:ed)?\s+([^\s{}$\\]+|\\[A-Za-z]+(?:\{[^{}]*\})*)")
_SEPARATOR = re.compile(
    r"\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}"  # \text{ or }
    r"|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|\\.|[,;()\[\]{}]",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_DRESS = re.compile(r"\\(?:(mathbf|boldsymbol|underline)|text|textrm|textbf|mathrm|mbox)\s*+\{(.*)\}", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_BOLD = re.compile(r"\{?\s*+\\bf(?![A-Za-z])(.*)", re.DOTALL)
_PLAIN = re.compile(r"\(?\s*+([-+−]?\s*+(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*|/\d+)?|[-+−]?\.\d+)\s*+\)?")


def boxed_contents(text: str) -> list[str]:
    r"""Return the contents of a response's complete \boxed{...} or \fbox{...}, in the order in which they open.

    A box without braces holds one word: `\boxed 42`.
    """
    opened: list[tuple[bool, int]] = []
    contents: dict[int, str] = {}
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{" or (token.endswith("{") and len(token) > 2):
            opened.append((token != "{", match.end()))
        elif token == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                contents[start] = text[start : match.start()].strip()
    for bare in _BARE_BOX.finditer(text):
        contents[bare.start(1)] = bare[1].rstrip(".,;:")
    return [contents[start] for start in sorted(contents)]


def last_boxed(text: str) -> str | None:
    r"""Return the content of a response's last complete \boxed{...} (the inner one if nested), or None."""
    boxes = boxed_contents(text)
    return boxes[-1] if boxes else None


def normalise(answer: str) -> str:
    """Return an answer without what has no meaning: dollars, \\left, \\right, \\dfrac, a final full stop, and spaces.

    A space between digits stays, as `~`: 1 2 is not 12.
    """
    text = re.sub(r"\\!\s*", "", answer).replace("\\,", " ").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\(left|right)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\s+", "", re.sub(r"(?<=\d)\s+(?=\d)", "~", text)).rstrip(".")


def same_words(gold: str, answer: str) -> bool:
    r"""Return whether two answers are the same words, inside \text{} or not, and whatever the first letter's case."""
    words = [normalise(_WORDS.sub(r"\1", text)) for text in (gold, answer)]
    one, other = words
    alike = one[:1].lower() == other[:1].lower() and one[1:] == other[1:] and one.isalpha() and len(one) > 2
    return one == other or alike


def strip_font(answer: str) -> str:
    r"""Return `17` for `\mathbf{17}`, `\bf 17`, `\text{17}` or `\textbf{(17)}`; \text stays around words."""
    text = answer.strip().rstrip(".")
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if match := _BOLD.fullmatch(text):
        inner = match[1].strip()
        inner = inner.removesuffix("}") if text.startswith("{") else inner
        return strip_font(inner) if _balanced(inner) else answer
    match = _DRESS.fullmatch(text)
    if match is None or not _balanced(match[2]):
        return answer
    if match[1]:
        return strip_font(match[2])
    number = _PLAIN.fullmatch(match[2].strip())
    return number[1] if number else answer


def _balanced(text: str) -> bool:
    """Return whether the braces of a text match."""
    depth = 0
    for match in _BRACES.finditer(text):
        token = match.group()
        depth += 1 if token == "{" or (token.endswith("{") and len(token) > 2) else -(token == "}")
        if depth < 0:
            return False
    return depth == 0


def split_answers(text: str) -> list[str]:
    r"""Split a list such as `1, 3`, `x=1 \text{ or } x=3` or `\{1,3\}`; `(1,3)` and `12,345` are one answer each."""
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\!\s*|\\?\$", "", text).strip().rstrip(".")
    inner = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    if inner and "\\}" not in inner[1]:
        text = inner[1]
    if _THOUSANDS.fullmatch(text):
        return [text]
    return [part for part in map(str.strip, _split(text)) if part]


def _split(text: str) -> Iterator[str]:
    """Split at commas, semicolons, `and` and `or` outside brackets."""
    depth = start = 0
    for match in _SEPARATOR.finditer(text):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif depth == 0 and (token in ",;" or "and" in token or "or" in token):
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


EqualityCheck = Callable[[str, str], bool | None]
"""(gold, answer) -> verdict of the strict comparison in which a set may equal a relation; None if it failed."""

_MAX_EXPONENT = 400
_MAX_POWER = 10_000
_MAX_ANSWERS = 8  # longer lists get the strict comparison only

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(rf"({_NUMBER})(?:[eE]([-+]?\d{{1,4}}))?")
_SCIENTIFIC = re.compile(
    rf"(?:({_NUMBER})(?:\\times|\\cdot|\*|×|·))?(?<![\d.])10(?:\^|\*\*)(?:\{{([-+]?\d{{1,4}})\}}|([-+]?\d{{1,4}}))"
)
_TOWER = re.compile(r"(?<=[\d)}])(?:\^\{*\d+)+")
_FACTORIAL = re.compile(r"(\d{5,})!")
_FRACTION = re.compile(rf"([-+]?)\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}")
_MIXED = re.compile(r"([-+]?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_BASE = re.compile(r"\\hat\{base(\w+)in\d+\}")  # as `notation.rewrite` writes a number in another base
_NO_SOLUTION = re.compile(r"\\text\{\s*[Nn]o (?:real |integer )?solutions?\.?\s*\}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?|\\text\{\s*\(?([A-Za-z])\)?\s*\}")
_LOGARITHM = re.compile(r"\\log(?![A-Za-z])(?!\s*_)")  # of which base, the question says
_ANGLE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\text\{\s*degrees?\s*\}")
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)|\\approx(?![a-z])")
_GOLDS_NAME = re.compile(r"\s*\\?[A-Za-z]\s*(?:_\s*(?:\w|\{[^{}]*\})\s*)?(?:\([A-Za-z]\)\s*)?")  # x, f(x), X_{d}

_MACRO = r"\\(?:text|textrm|textbf|mathrm|mbox|rm|operatorname)\s*\{[^{}]*\}"
_WORD = (
    r"(?:(?:k|c|m|n|M|G|d)?(?:m|s|g|W|J|V|A|N|K|C|L|T|Hz|Pa|eV|pc)|erg|dyn|rad|sr|mol|AU|ly|yr|h|hr|min|hours?|days?"
    r"|years?|minutes?|seconds?|meters?|metres?|grams?|cents?|dollars?|inch|inches|in|ft|feet|miles?|degrees?|units?"
    r"|[kMG]?Wh|Nm|Js)(?![A-Za-z])"  # a complete word: `hours` also reads h, h and s, and a row of them 2^n units
)
_POWER = r"(?:\s*\^\s*(?:-?\d|\{\s*-?\d+\s*\}))?"
_JOIN = r"(?:\s|~|\\[,;: ]|/|\\cdot|\\times|\*|\\quad)*+"
_DEGREE = r"\^\s*\{?\s*\\circ\s*\}?"
_MARKED_UNITS = re.compile(rf"(?:{_JOIN}(?:{_MACRO}{_POWER}|{_DEGREE}|\\degree|\\?%))+{_JOIN}\Z")
_BARE_UNITS = re.compile(rf"(?<=[\d}}])(?:\s|~|\\[,;: ])+{_WORD}{_POWER}(?:{_JOIN}{_WORD}{_POWER})*\s*\Z")
_TEXT_COMMAND = r"\\(?:text|textrm|textbf|mathrm|mbox)"
_TEXT_WITH_UNITS = re.compile(rf"{_TEXT_COMMAND}\s*+\{{\s*+({_NUMBER}\s++[A-Za-z][A-Za-z\s^\d]*+)\}}\Z")
_RELATION = re.compile(r"[<>]|\\[lg]e|\\ne|\\in(?![a-z])|matrix")  # compared again, with a set or a tuple
_PRIME = re.compile(r"([A-Za-z])(?:\^\{\\prime\}|\^\\prime|')")


def leniently_equal(gold: str, answer: str, equal: EqualityCheck) -> bool | None:
    """Return whether an answer that is strictly wrong is right in another notation; None if a comparison failed."""

    def compare(one: str, other: str) -> bool | None:
        compared = (normalise(one), normalise(other)) == (normalise(gold), normalise(answer))
        return False if compared and not _RELATION.search(gold + answer) else equal(one, other)

    golds, answers = split_answers(gold), split_answers(answer)
    if len(golds) == 1 < len(answers) and _RELATION.search(answer):
        return equal(gold, answer)
    if not 0 < len(golds) == len(answers) <= _MAX_ANSWERS:
        return False
    failed = False
    for one in golds:
        for other in answers:
            verdict = _same(one, other, compare)
            failed |= verdict is None
            if verdict:
                answers.remove(other)
                break
        else:
            return None if failed else False
    return True


def exact_number(text: str) -> Fraction | None:
    r"""Return the value of `1,234.5`, `4.5e33`, `4.5\times10^{33}`, `-1./3` or `1\frac{1}{3}`; None for other text."""
    if re.search(r",\s", text):
        return None
    text = re.sub(r"\\[;: !]|\\left|\\right", "", normalise(text)).replace("−", "-")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if len(text) > 2 * _MAX_EXPONENT:
        return None
    if match := _MIXED.fullmatch(text):
        part = Fraction(int(match[3]), int(match[4])) if int(match[4]) else 1
        return Fraction(f"{match[1]}1") * (int(match[2]) + part) if part < 1 else None
    if match := _FRACTION.fullmatch(text):
        return _quotient(Fraction(f"{match[1]}1"), _decimal(match[2]), _decimal(match[3]))
    above, slash, below = text.partition("/")
    return _quotient(Fraction(1), _decimal(above), _decimal(below)) if slash else _decimal(above)


def _quotient(sign: Fraction, above: Fraction | None, below: Fraction | None) -> Fraction | None:
    return None if above is None or not below else sign * above / below


def has_huge_power(text: str) -> bool:
    """Return whether a text holds a power or factorial above `_MAX_POWER`, such as `10^{10^{10}}`."""
    text = normalise(text)
    for tower in _TOWER.findall(text):
        power = 1.0
        for number in reversed(re.findall(r"\d+", tower)):
            digits = power * math.log10(max(1, int(number[:300])))
            if len(number) > 300 or digits > math.log10(_MAX_POWER):
                return True
            power = 10**digits
    return any(int(number[:9]) > _MAX_POWER for number in _FACTORIAL.findall(text))


def reads_e_as_euler(text: str) -> bool:
    """Return whether math-verify would read the e of a text such as `1e-5` as Euler's number."""
    match = _DECIMAL.fullmatch(normalise(text))
    return match is not None and match[2] is not None


def _decimal(text: str) -> Fraction | None:
    if match := _DECIMAL.fullmatch(text):
        mantissa, exponent = match[1], int(match[2] or 0)
    elif match := _SCIENTIFIC.fullmatch(text):
        mantissa, exponent = match[1] or "1", int(match[2] or match[3])
    else:
        return None
    return Fraction(mantissa) * Fraction(10) ** exponent if abs(exponent) <= _MAX_EXPONENT else None


def _same(gold: str, answer: str, equal: EqualityCheck) -> bool | None:
    gold, answer = _right_sides(strip_font(gold), strip_font(answer))
    if (letters := (_CHOICE.fullmatch(gold), _CHOICE.fullmatch(answer))) and all(letters) and "(" in gold:
        choices = [letter[1] or letter[2] for letter in letters if letter]
        return choices[0].lower() == choices[1].lower()
    if bool(_BASE.fullmatch(gold)) != bool(_BASE.fullmatch(answer)):
        return bool(_BASE.fullmatch(gold)) and _BASE.sub(r"\1", gold) == answer
    if (_LOGARITHM.search(gold) is None) != (_LOGARITHM.search(answer) is None) and r"\ln" in gold + answer:
        gold, answer = _LOGARITHM.sub(r"\\ln", gold), _LOGARITHM.sub(r"\\ln", answer)
    if bool(_ANGLE.search(gold)) != bool(_ANGLE.search(answer)) and r"\pi" in gold + answer:
        gold, answer = (_ANGLE.sub(r" \\cdot \\frac{\\pi}{180}", text) for text in (gold, answer))
    gold, answer = (_TEXT_WITH_UNITS.sub(r"\1", _NO_SOLUTION.sub(r"\\emptyset", text)) for text in (gold, answer))
    gold, answer = _MARKED_UNITS.sub("", gold), _MARKED_UNITS.sub("", answer)
    answer = _BARE_UNITS.sub("", answer)  # a gold's last letter is a variable: \frac{37}{4} m
    numbers = exact_number(gold), exact_number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    gold, answer = _readable(gold), _readable(answer)
    if not gold or not answer:
        return False
    return normalise(gold) == normalise(answer) or equal(gold, answer)


def _right_sides(gold: str, answer: str) -> tuple[str, str]:
    """Return the right side of `=` if only one text has one; a gold's only after a name of one letter."""
    of_gold, of_answer = _EQUALS.split(gold), _EQUALS.split(answer)
    if len(of_gold) == 1 < len(of_answer):
        return gold, of_answer[-1]
    if len(of_gold) == 2 > len(of_answer) and _GOLDS_NAME.fullmatch(of_gold[0]):
        return of_gold[1], answer
    return gold, answer


def _readable(text: str) -> str:
    """Rewrite powers of ten, numpy's names, indices, factorials in powers and primes in LaTeX for math-verify."""
    text = re.sub(rf"({_NUMBER})[eE]([-+]?\d{{1,4}})(?![\w.])", r"\1 \\cdot 10^{\2}", text)
    text = re.sub(r"\bnp\.(?=[a-z])", r"\\", text)
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(\w!|\([^()]*\)!)\^", r"(\1)^", text)
    return _PRIME.sub(r"\1_{prime}", text)


# Units

_LENGTHS: dict[str, Fraction | int] = {
    "mm": 1,
    "cm": 10,
    "dm": 100,
    "m": 1000,
    "km": 10**6,
    "in": Fraction(254, 10),
    "ft": Fraction(3048, 10),
}
_LENGTHS |= {"yd": Fraction(9144, 10), "mi": 1609344}
_QUANTITIES: dict[str, dict[str, Fraction | int]] = {
    "length": _LENGTHS,
    "time": {"s": 1, "min": 60, "h": 3600, "day": 86400, "week": 7 * 86400},
    "years": {"month": 1, "year": 12},
    "mass": {"mg": 1, "g": 1000, "kg": 10**6, "t": 10**9},
    "weight": {"oz": 1, "lb": 16, "ton": 32000},
    "volume": {"ml": 1, "l": 1000},
    "money": {"cent": 1, "dollar": 100},
    "angle": {"degree": 1},
    "radians": {"rad": 1},
    "speed": {"km/h": 1, "kmh": 1, "kph": 1, "mph": Fraction(1609344, 10**6), "m/s": Fraction(36, 10)},
}
_UNITS = {unit: (kind, Fraction(size)) for kind, sizes in _QUANTITIES.items() for unit, size in sizes.items()}
_LONG = {"millimeter": "mm", "centimeter": "cm", "decimeter": "dm", "meter": "m", "kilometer": "km", "inche": "in"}
_LONG |= {
    "inch": "in",
    "foot": "ft",
    "feet": "ft",
    "yard": "yd",
    "mile": "mi",
    "second": "s",
    "sec": "s",
    "minute": "min",
}
_LONG |= {"hour": "h", "hr": "h", "milligram": "mg", "gram": "g", "kilogram": "kg", "kilo": "kg", "tonne": "t"}
_LONG |= {"ounce": "oz", "pound": "lb", "milliliter": "ml", "liter": "l", "radian": "rad", "deg": "degree"}
_OPPOSITES = (
    {"am", "pm"},
    {"north", "south", "east", "west", "northeast", "northwest", "southeast", "southwest"},
    {"clockwise", "counterclockwise", "anticlockwise"},
    {"left", "right"},
    {"up", "down"},
    {"above", "below"},
    {"increase", "decrease"},
    {"profit", "gain", "loss"},
    {"even", "odd"},
)
_BOUNDS = {"more", "less", "fewer", "least", "most", "greater", "not", "except", "minus", "squared", "cubed"}
_TEXT = re.compile(_TEXT_COMMAND + r"\s*\{([^{}]*)\}")
_UNIT = re.compile(
    rf"{_TEXT_COMMAND}\s*\{{\s*([A-Za-z]+(?:/[a-z]+)?)\.?\s*(?:\^\{{?([23])\}}?)?\s*\}}(?:\s*\^\s*\{{?([23])\}}?)?\s*\.?$"
    rf"|(?<=[\d}}\s])([A-Za-z]{{2,}}(?:/[a-z]+)?|m/s)\.?(?:\s*\^\s*\{{?([23])\}}?)?\s*$|({_DEGREE})\s*$"
)


def compare_units(gold: str, answer: str) -> bool | None:
    """Return False if the words beside two numbers make them unequal, True for the same in another unit, else None.

    A unit that only one of the two has says nothing, and nor does one that is not known here.
    """
    words = [_words(text) for text in (gold, answer)]
    if words[0] & _BOUNDS != words[1] & _BOUNDS:
        return False
    if any(words[0] & group and words[1] & group and words[0] & group != words[1] & group for group in _OPPOSITES):
        return False
    units = [_unit(text) for text in (gold, answer)]
    if units[0] is None or units[1] is None or units[0][:3] == units[1][:3]:
        return None
    numbers = [exact_number(unit[3]) for unit in units if unit]
    if {units[0][0], units[1][0]} == {"angle", "radians"} and None in numbers:
        return None
    if None in numbers or units[0][0] != units[1][0] or units[0][2] != units[1][2]:
        return False
    sizes = [
        number * unit[1] ** unit[2] for number, unit in zip(numbers, units, strict=True) if unit and number is not None
    ]
    return sizes[0] == sizes[1]


def _words(text: str) -> set[str]:
    marked = " ".join(_TEXT.findall(text))
    plain = re.sub(r"\\[A-Za-z]+|[^A-Za-z. ]", " ", _TEXT.sub(" ", text))
    words = re.findall(
        r"[a-z]+",
        f"{marked} {plain}".lower().replace(".m.", "m").replace(". m", "m").replace("a.m", "am").replace("p.m", "pm"),
    )
    return {word for word in words if len(word) > 1}


def _unit(text: str) -> tuple[str, Fraction, int, str] | None:
    """Return (quantity, size, power, number) of a text that ends with a known unit."""
    match = _UNIT.search(text)
    if match is None:
        return None
    word = "degree" if match[6] else (match[1] or match[4])
    name = word if word in _UNITS else word.lower()
    name = name if name in _UNITS else name.removesuffix("s").replace("metre", "meter").replace("litre", "liter")
    name = _LONG.get(name, name)
    if name not in _UNITS:
        return None
    power = int(match[2] or match[3] or match[5] or 1)
    return *_UNITS[name], power, text[: match.start()]
