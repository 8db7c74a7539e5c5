r"""Rewrites an answer, in Unicode, plain text or any LaTeX, into LaTeX that the parser reads as a mathematician would.

Spaces count between digits: `12 345` is one number, `1 1/2` a mixed one, and `1 2` none. What stands for itself gets a
name of its own that no letter has: a number in another base, the integer of a family `\frac{\pi}{2} + k\pi`, an angle.
"""

# ruff: noqa: RUF001

import itertools
import re
import unicodedata
from fractions import Fraction

_COMMANDS = (
    r"times cdot cdot cdot div pm mp le ge le ge ne approx infty cup cap in setminus emptyset angle triangle ldots "
    r"langle rangle langle rangle lfloor rfloor lceil rceil sum prod int"
)
_CHARACTERS = {
    **{
        character: rf"\{command} "
        for character, command in zip("×·⋅∙÷±∓≤≥⩽⩾≠≈∞∪∩∈∖∅∠△…⟨⟩〈〉⌊⌋⌈⌉∑∏∫", _COMMANDS.split(), strict=True)
    },
    **{letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℝℤℚℕℂ", "RZQNC", strict=True)},
    **{
        "−": "-",
        "–": "-",
        "°": r"^\circ ",
        "˚": r"^\circ ",
        "º": r"^\circ ",
        "∨": r"\lor ",
        "∧": r"\land ",
        "′": "'",
        "、": ",",
        "ℯ": "e",
        "\u2044": "/",
    },
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_ROOT = re.compile(r"([√∛∜])\s*(\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\}|[\d.]+|\\?[A-Za-z]+)")
_GREEK = re.compile(r"[\u0391-\u03c9]")

_TEXT = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname|rm)"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    rf"(?:{_TEXT}\s*\{{\s*)?(?<![\d.])(\d[\d,]*(?:\.\d+)?|\\frac\{{\d+\}}\{{\d+\}})\s*(?:{_TEXT}\s*\{{\s*)?"
    rf"({'|'.join(_SCALES)}|dozen)s?(?![A-Za-z])(?:\s*\}})?([^{{}}]*\}})?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "twelve": 12}
_BASE = re.compile(
    rf"\(?(?<![A-Za-z\d.\\{{_^])(\d[\dA-F]*|(?:{_TEXT})\{{\s*[\dA-F]+\s*\}})\)?\s*"
    rf"(?:_\s*\{{?\s*(?:{_TEXT}\s*\{{)?\s*(?:base)?\s*(\d+|{'|'.join(_BASES)})(?![\w,])\s*\}}*"
    rf"|(?:{_TEXT}\s*\{{\s*)?\s*(?:in\s+)?base[\s-]*\}}?\s*(\d+|{'|'.join(_BASES)})(?!\w)\s*\}}*)"
)
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\\(?:overline|bar|dot)\s*(\d)|\((\d+)\)(?![(^_]))(?!\s*\d)"
)
_DOTTED = re.compile(r"\\dot\{?(\d)\}?(\d*)\\dot\{?(\d)\}?")
_CONTINUED = re.compile(r"(?<![\d.])(\d*)\.(\d*?)(\d{1,6}?)\3\3+\s*(?:\.\.\.|\\l?dots|\\cdots)")
_UPRIGHT = re.compile(
    r"\\(?:text|textrm|mathrm|mathit|operatorname|rm)(?:\s*\{\s*(e|i|\\pi)\s*\}|\s+(e|i)(?![A-Za-z]))"
)
_SYNONYMS = {r"\langle": "(", r"\rangle": ")", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lg": r"\log_{10}"}
_SYNONYMS |= dict.fromkeys([r"\lor", r"\vee"], r"\text{ or }") | dict.fromkeys([r"\land", r"\wedge"], r"\text{ and }")
_PHRASES = {
    "the empty set": r"\emptyset",
    "empty set": r"\emptyset",
    "infinity": r"\infty",
    "all real numbers": r"\mathbb{R}",
    "all reals": r"\mathbb{R}",
}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PHRASES |= {word: str(digit) for digit, word in enumerate(_DIGITS)}
_SET_BUILDER = re.compile(
    r"\\\{ ?([a-z]) ?(?:\\in ?\\mathbb ?\{R\} ?)?(?:\\mid|\\vert|\||:) ?(.*[<>=].*|.*\\[lg]e .*)\\\}"
)
_SPACES = re.compile(
    r"(?:\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\hspace\*?\{[^{}]*\}|\\(?:thin|med|en)space(?![A-Za-z])|\s)+"
)
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)(?! \d)|(?<=\d)\.\d{3}(?: \d{3})*(?: \d{1,3})(?!\d)(?! \d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]*,?\d)")
_MIXED = re.compile(r"(?<![\d.\w}^_])(\d+) (\d+) ?/ ?(\d+)(?![\d/.])")
_ARGUMENTS = re.compile(r"\\(frac|binom)(?: (?=[A-Za-z])|(?= ?\d)) ?([A-Za-z\d]) ?([A-Za-z\d])|([_^]) ?(\d) (?=\d)")
_MODULUS = re.compile(r"\\[pb]?mod ?(?:\{ ?(\w+) ?\}|(\w+))|\( ?(?:\\[pb]mod|mod) ?\{? ?(\w+) ?\}? ?\)")
_DEGREES = r"\^ ?(?:\{ ?\\circ ?\}|\\circ)"
_ANGLE = r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})"
_TRIGONOMETRIC = re.compile(
    r"\\(sin|cos|tan|cot|sec|csc)(\^ ?\{?\d\}?)? ?"
    rf"(?:\( ?{_ANGLE} ?{_DEGREES} ?\)|\{{ ?{_ANGLE} ?{_DEGREES} ?\}}|{_ANGLE} ?{_DEGREES})"
)
_SIGN = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_MOST_SIGNS = 3
_DECLARED = re.compile(
    rf"[,;(]?(?: |{_TEXT}\{{[^{{}}]*\}})*\(?([a-z]) ?\\in ?\\(?:mathbb|mathbf|Bbb)? ?\{{?Z\}}?\)?(?: |\$)*$"
    rf"|[,;(]? ?{_TEXT}\{{[^{{}}]*\}} ?([a-z]) ?{_TEXT}\{{[^{{}}]*integers?[^{{}}]*\}}\)? ?$"
    r"|[,;(]? ?(?:where |for )?(?:any |some |every |all )?(?:integers? )?([a-z]) (?:is|are) (?:an |any )?integers?\)?$"
)
FAMILY = r"\hat{z}"
"""The integer of a family such as pi/2 + k pi."""
_STEP = rf"\\pi(?![A-Za-z])|\d+ ?{_DEGREES}"
_MULTIPLES = re.compile(r"(?:\\frac\{)?\d* ?(?:[klmn] ?\\pi|\\pi ?[klmn])(?:\}\{\d+\}| ?/ ?\d+)?")
_CONSTANTS = re.compile(rf"{_TEXT}\s*\{{[^{{}}]*\}}|(?<![A-Za-z\\])(?<!hat\{{)(?:([Ee])(?= ?_)|(I)(?![A-Za-z(]))")
"""Letters that the parser takes for Euler's number or the imaginary unit; words are passed over."""
_PERIODS = re.compile(
    r"\(\d* ?([klmn]) ?[+-] ?\d+\) ?\\pi(?![A-Za-z])|"
    rf"(?<![A-Za-z\\])([klmn]) ?(?:\\cdot|\\times)? ?(?:{_STEP})"
    rf"|(?:{_STEP}) ?(?:\\cdot|\\times)? ?([klmn])(?![A-Za-z_^'(])"
)


def rewrite(text: str) -> str:
    """Return an answer in LaTeX without what has no meaning; it may still be words."""
    text = _spaces(_plain_latex(_unicode(text)))
    words = re.sub(rf"^ ?{_TEXT}\s*\{{(.*)\}}\.?$", r"\1", text).strip(" .").lower()
    if words in _PHRASES:
        return _PHRASES[words]
    if builder := _SET_BUILDER.fullmatch(text.strip()):
        text = builder[2]
    return _names(_numbers(text)).strip()


def _unicode(text: str) -> str:
    for table, mark in ((_RAISED, "^"), (_LOWERED, "_")):
        text = re.sub(f"([{''.join(table)}]+)", rf"{mark}{{\1}}", text).translate({ord(k): v for k, v in table.items()})
    text = re.sub(r"[½⅓⅔¼¾⅕-⅞⅐⅑⅒]", _vulgar_fraction, text)
    text = "".join(_CHARACTERS.get(character, character) for character in text)
    text = _GREEK.sub(_greek_letter, text)
    text = unicodedata.normalize("NFKC", text)  # full-width forms, among others
    return _ROOT.sub(lambda root: rf"\sqrt{ {'√': '', '∛': '[3]', '∜': '[4]'}[root[1]] }{{{_inside(root[2])}}}", text)


def _inside(group: str) -> str:
    return group[1:-1] if group[0] in "({" else group


def _vulgar_fraction(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKD", match[0]).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _greek_letter(match: re.Match[str]) -> str:
    words = unicodedata.name(match[0], "").split()
    if len(words) != 4 or words[:1] != ["GREEK"]:
        return match[0]
    name = words[3].lower().replace("lamda", "lambda")
    return rf"\{name if words[1] == 'SMALL' else name.capitalize()} "


def _plain_latex(text: str) -> str:
    """Remove boxes, delimiters of formulas, sizes and synonyms."""
    for _ in range(2):
        text = re.sub(r"\\(?:boxed|fbox|displaylimits|ensuremath)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text)
    text = re.sub(r"\\[()\[\]](?![A-Za-z])|\\(?:display|text)style(?![A-Za-z])|\\limits(?![A-Za-z])", " ", text)
    text = re.sub(r"\\(?:left|right|[Bb]igg?[lrm]?|m?left|m?right)(?![A-Za-z])\s*\.?(?=[^A-Za-z])", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset ", text)
    text = (
        re.sub(r"\\([lg]e|ne)(?:q|qslant|qq)(?![A-Za-z])", r"\\\1", text)
        .replace(r"\lvert", "|")
        .replace(r"\rvert", "|")
    )
    if not _UPRIGHT.fullmatch(text.strip()):  # a choice
        text = _UPRIGHT.sub(lambda letter: f"{{{letter[1] or letter[2]}}}", text)
    text = re.sub(r"\\degrees?(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    if pair := re.fullmatch(r"\s*(?:\\langle|<)([^<>]*,[^<>]*)(?:\\rangle|>)\s*", text):
        text = f"({pair[1]})"
    text = re.sub(r"\\(?:mathbf|vec|boldsymbol) ?\{ ?([ijk]) ?\}", r"\\hat{\1}", text)
    text = re.sub(r"\\(?:text|mathrm) ?\{ ?(gcd|lcm|max|min) ?\}", r"\\operatorname{\1}", text)
    for command, simple in _SYNONYMS.items():
        text = re.sub(rf"{re.escape(command)}(?![A-Za-z])", simple.replace("\\", r"\\"), text)
    text = re.sub(r"\\(min|max) ?\\\{(.*?)\\\}", r"\\\1(\2)", text)
    return re.sub(r"([\s\d])([AaPp])\. ?[Mm]\.?|\b([AP])M\b", lambda m: f"{m[1] or ''}{(m[2] or m[3]).lower()}m", text)


def _spaces(text: str) -> str:
    text = re.sub(r"\\!\s*", "", text.replace("{,}", ","))
    if "\\begin" in text:  # \\ [2pt] and & separate there
        return re.sub(r"\s+", " ", text)
    return _SPACES.sub(" ", text)


def _numbers(text: str) -> str:
    text = _GROUPS.sub(lambda number: number[0].replace(" ", ""), text)
    text = _without_thousands(text)
    text = _DOTTED.sub(r"\\overline{\1\2\3}", text)
    text = _CONTINUED.sub(_repeating_decimal, _REPEATING.sub(_repeating_decimal, text))
    text = _ARGUMENTS.sub(lambda m: f"{m[4]}{{{m[5]}}} " if m[4] else rf"\{m[1]}{{{m[2]}}}{{{m[3]}}}", text)
    text = _MIXED.sub(lambda m: rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}" if int(m[2]) < int(m[3]) else m[0], text)
    text = re.sub(r"(\\sqrt|\\frac ?\{[^{}]*\}) ?(\d\d+)", r"\1{\2}", text)
    if "\\equiv" in text or "pmod" in text or re.search(r"\( ?\\?b?mod", text):
        text = _MODULUS.sub(lambda m: rf"\pmod{{{m[1] or m[2] or m[3]}}}", text)
    text = text.replace(r"\bmod", r"\mod")
    text = re.sub(r"(\d) (?=\\frac)", r"\1", text)
    return _SCALE.sub(_scaled_number, text)


def _without_thousands(text: str) -> str:
    """Join `1,234` outside brackets if every other comma is followed by a space."""
    depths = _depths(text)
    numbers = [m for m in _THOUSANDS.finditer(text) if depths[m.start()] == 0]
    inside = sum(number[0].count(",") for number in numbers)
    if inside != len(re.findall(r",(?! )", text)):
        return text
    for number in reversed(numbers):
        text = text[: number.start()] + number[0].replace(",", "") + text[number.end() :]
    return text


def _depths(text: str) -> list[int]:
    """Return how many brackets are open after each character."""
    return list(itertools.accumulate((character in "([{") - (character in ")]}") for character in text))


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, start, *rest = match.groups()
    period = next(digits for digits in rest if digits)
    if len(match[0]) > 60:
        return match[0]
    value = Fraction(
        int((whole + start + period) or 0) - int((whole + start) or 0), 10 ** len(start) * (10 ** len(period) - 1)
    )
    return _fraction(value)


def _fraction(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _scaled_number(match: re.Match[str]) -> str:
    number, word, rest = match[1], match[2], match[3]
    factor = 12 if word == "dozen" else 10 ** _SCALES[word]
    if number.startswith("\\"):
        value = Fraction(*map(int, re.findall(r"\d+", number)[:2]))
    else:
        value = Fraction(number.replace(",", ""))
    text = _fraction(value * factor)
    unit = (rest or "").removesuffix("}").strip()
    return text + (rf"\text{{ {unit}}}" if unit and match[0].endswith("}") else rest or "")


def _names(text: str) -> str:
    """Name what the parser would read as a number, a product or a constant, and is none."""
    text = _TRIGONOMETRIC.sub(lambda m: rf"\{m[1]}{m[2] or ''}(\frac{{{m[3] or m[4] or m[5]} \pi}}{{180}})", text)
    text = re.sub(r"^([A-F][\dA-F]+)_ ?\{?(1[1-6])\}?$", r"\\text{\1}_{\2}", text)
    text = _BASE.sub(_number_in_base, text)
    text = _family(text)
    text = re.sub(r"\\(angle|triangle) ?([A-Z]) ?([A-Z]) ?([A-Z])(?![A-Za-z_'^])", _figure, text)
    text = re.sub(
        r"\\overline ?\{ ?([A-Z]) ?([A-Z]) ?\}", lambda m: rf"\overline{{{min(m[1], m[2])}{max(m[1], m[2])}}}", text
    )
    text = _CONSTANTS.sub(lambda m: rf"\hat{{{m[1] or m[2]}}}" if m[1] or m[2] else m[0], text)
    text = re.sub(r"(?:^|(?<=,)|(?<=, ))([A-Z]{3,})(?=$|,| ?\\text)", r"\\text{\1}", text)
    parts = [part.strip() for part in text.split(":")]
    if len(parts) > 2 and "\\text" not in text and all(re.fullmatch(r"[^,=<>]+", part) for part in parts):
        ratios = ", ".join(rf"\frac{{{part}}}{{{parts[0]}}}" for part in parts[1:])
        text = f"(1, {ratios})"
    return _both_signs(text)


def _both_signs(text: str) -> str:
    r"""Write a number with \pm in a fraction, root or bracket as several: the parser knows the sign outside alone."""
    if braces := re.fullmatch(r"(\\\{)(.*)(\\\})", text.strip()):
        return braces[1] + _both_signs(braces[2]) + braces[3]
    depths, parts = _depths(text), []
    commas = [place for place, character in enumerate(text) if character == "," and depths[place] == 0]
    for before, end in itertools.pairwise([-1, *commas, len(text)]):
        part = text[before + 1 : end]
        inside = any(depths[sign.start()] > 0 for sign in _SIGN.finditer(text, before + 1, end))
        parts.append(_signed(part) if inside else part)
    return ",".join(parts)


def _signed(part: str) -> str:
    name, _, rest = part.rpartition("=")
    signs = _SIGN.findall(rest)
    if "," in part or len(signs) > _MOST_SIGNS:  # a tuple, or a long list
        return part
    if "mp" in signs:  # the upper signs belong together
        choices = [signs, ["pm" if sign == "mp" else "mp" for sign in signs]]
    else:
        choices = [list(choice) for choice in itertools.product(("pm", "mp"), repeat=len(signs))]
    pieces, found = _SIGN.split(rest)[::2], []
    for choice in choices:
        marks = ["+" if sign == "pm" else "-" for sign in choice]
        one = pieces[0] + "".join(f"{mark}{piece}" for mark, piece in zip(marks, pieces[1:], strict=True))
        found.append(re.sub(r"(^|[({\[]) ?\+ ?", r"\1", one))
    return (f"{name}=" if name else "") + ", ".join(found)


def _figure(match: re.Match[str]) -> str:
    """An angle is the same from either side; a triangle has no first corner."""
    corners = match[2] + match[3] + match[4]
    corners = min(corners, corners[::-1]) if match[1] == "angle" else "".join(sorted(corners))
    return rf"\hat{{{match[1]}{corners}}}"


def _number_in_base(match: re.Match[str]) -> str:
    base = match[2] or match[3]
    digits = re.sub(rf"{_TEXT}|[{{}}\s]", "", match[1]).lstrip("0") or "0"
    number = _BASES.get(base) or int(base)
    if number == 10:
        return f"0{digits}"  # equal to the number, and not a base left out
    if not 2 <= number <= 36 or any(int(digit, 36) >= number for digit in digits):
        return match[0]
    return rf"\hat{{base{digits}in{number}}}"


def _family(text: str) -> str:
    """Name the integer of a family of numbers: one that is said to be an integer, or that multiplies a period."""
    letters = set()
    if match := _DECLARED.search(text):
        letters.add(next(letter for letter in match.groups() if letter))
        text = text[: match.start()].rstrip(" ,;")
    elif re.search(r"[+\-]|\\pm", text) or _MULTIPLES.fullmatch(text.strip()):
        letters |= {next(filter(None, m.groups())) for m in _PERIODS.finditer(text)}
    if len(letters) != 1:
        return text
    return re.sub(rf"(?<![A-Za-z\\]){letters.pop()}(?![A-Za-z_])", lambda _: FAMILY, text)


def name_family(text: str, letter: str = r"(?<![A-Za-z\\])[a-z](?![A-Za-z_])") -> str:
    """Return a text whose only letter is the integer of a family, since the text that it is compared with has one."""
    letters = set(re.findall(letter, text))
    return text if len(letters) != 1 or FAMILY in text else re.sub(letter, lambda _: FAMILY, text)
