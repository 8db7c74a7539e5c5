"""What a response answers: its boxes, their text without what carries no meaning, and the answers of a list."""

import re
from collections.abc import Iterator

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SEPARATOR = re.compile(
    r"\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}"  # \text{ or }
    r"|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|\\.|[,;()\[\]{}]",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_DRESS = re.compile(r"\\(?:(mathbf|boldsymbol|underline)|text|textrm|textbf|mathrm|mbox)\s*+\{(.*)\}", re.DOTALL)
_BOLD = re.compile(r"\{?\s*+\\bf(?![A-Za-z])(.*)", re.DOTALL)
_PLAIN = re.compile(r"\(?\s*+([-+−]?\s*+(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*|/\d+)?|[-+−]?\.\d+)\s*+\)?")


def boxed(text: str) -> list[str]:
    r"""Contents of the complete \boxed{...} of a response, in the order in which they are opened."""
    opened: list[tuple[bool, int]] = []
    found: dict[int, str] = {}
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{" or token.startswith("\\boxed"):
            opened.append((token != "{", match.end()))
        elif token == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                found[start] = text[start : match.start()].strip()
    return [found[start] for start in sorted(found)]


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} of a response (the inner one where they are nested), or None."""
    boxes = boxed(text)
    return boxes[-1] if boxes else None


def normalise(answer: str) -> str:
    """An answer's text without what carries no meaning: spaces, dollars, \\left, \\right, \\dfrac, a final stop."""
    text = answer.replace("\\!", "").replace("\\,", "").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\(left|right)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\s+", "", text).rstrip(".")


def undressed(answer: str) -> str:
    r"""`17` for an answer that is wholly `\mathbf{17}`, `\bf 17`, `\text{17}` or `\textbf{(17)}`, any other as it is.

    Around words \text stays: math-verify knows it, and `\text{east}` is no product of four symbols.
    """
    text = answer.strip().rstrip(".")
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if match := _BOLD.fullmatch(text):
        inner = match[1].strip()
        inner = inner.removesuffix("}") if text.startswith("{") else inner
        return undressed(inner) if _balanced(inner) else answer
    match = _DRESS.fullmatch(text)
    if match is None or not _balanced(match[2]):
        return answer
    if match[1]:
        return undressed(match[2])
    number = _PLAIN.fullmatch(match[2].strip())
    return number[1] if number else answer


def _balanced(text: str) -> bool:
    """Whether every brace of a text has its other one in the text."""
    depth = 0
    for match in _BRACES.finditer(text):
        token = match.group()
        depth += 1 if token == "{" or token.startswith("\\boxed") else -(token == "}")
        if depth < 0:
            return False
    return depth == 0


def answers_of(text: str) -> list[str]:
    r"""The answers of a list such as `1, 3`, `x=1 \text{ or } x=3` or `\{1,3\}`; `(1,3)` and `12,345` are one each."""
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\!\s*|\\?\$", "", text).strip().rstrip(".")
    inner = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    if inner and "\\}" not in inner[1]:
        text = inner[1]
    if _THOUSANDS.fullmatch(re.sub(r"\s", "", text)):
        return [text]
    return [part for part in map(str.strip, _split(text)) if part]


def _split(text: str) -> Iterator[str]:
    """At commas, semicolons, `and` and `or` outside of every bracket."""
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
