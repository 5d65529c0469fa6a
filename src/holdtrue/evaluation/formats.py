"""The output format of an answer, as far as its text shows it, and how to ask for an answer in that format."""

from __future__ import annotations

import re
from typing import NamedTuple

ASK = {
    "json": '\n\nAnswer with one JSON object and nothing else, such as {{"answer": "..."}}.',
    "code": "\n\nAnswer with code and nothing else. Put all that you want to say into it, as strings and comments.",
    "tags": "\n\nBegin your answer with the tag <{tag}>.",
    "numbered-list": "\n\nAnswer as a numbered list:\n1. ...\n2. ...\n3. ...",
    "bullet-list": "\n\nAnswer as a list of points:\n- ...\n- ...\n- ...",
}
"""What is put after a question to ask for each format; ``{tag}`` stands for the tag's name."""

_JSON = re.compile(r"(?:```\w*\s*)?[\[{]\s*[\"{\[\]}]")
_TAG = re.compile(r"<([A-Za-z][\w-]{0,30})(?:\s[^<>]{0,200})?>")
_NUMBERED = re.compile(r"\d{1,3}[.)]\s")
_BULLET = re.compile(r"[-*•]\s")
_KEYWORDS = (
    "import ", "from ", "def ", "class ", "async ", "return", "@", "#include", "#!", "using ", "package ",
    "function ", "const ", "let ", "var ", "public ", "private ", "static ", "func ", "SELECT ",
)  # fmt: skip
_BLOCKS = ("if ", "elif ", "else:", "for ", "while ", "with ", "try:", "except")
_ASSIGNED = re.compile(r"[A-Za-z_][\w.\[\]'\"]*\s?[-+*/|]?=\s?\S")
_CALL = re.compile(r"[A-Za-z_][\w.]*\(")


class Format(NamedTuple):
    """A format's name, a key of :data:`ASK`, and the tag's name where there is one."""

    name: str
    tag: str = ""


def answer_format(text: str) -> Format | None:
    """Return the format of an answer: JSON, code, XML-like tags, a numbered or a bulleted list; ``None`` for prose.

    A guess from the first characters of each line: cheap, and linear in the text whatever it holds.
    """
    text = text.strip()
    if _JSON.match(text):
        return Format("json")
    if tag := _TAG.match(text):
        return Format("tags", tag[1])
    lines = [line for line in text.splitlines() if line.strip()]
    if text.startswith("```") or (len(lines) > 1 and 2 * _code_lines(lines) >= len(lines)):
        return Format("code")
    for name, mark in (("numbered-list", _NUMBERED), ("bullet-list", _BULLET)):
        if sum(mark.match(line.lstrip()) is not None for line in lines) >= 2:
            return Format(name)
    return None


def _code_lines(lines: list[str]) -> int:
    count = 0
    fenced = False
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
            count += 1
        elif fenced or _like_code(line) or (count and line.startswith(("    ", "\t"))):
            count += 1
    return count


def _like_code(line: str) -> bool:
    bare = line.strip()
    return (
        bare.endswith((";", "{", "}", "});", "]"))
        or (bare.startswith(_BLOCKS) and bare.endswith(":"))
        or (bare.startswith(_KEYWORDS) and not bare.endswith("."))
        or _ASSIGNED.match(bare) is not None
        or (_CALL.match(bare) is not None and bare.endswith((")", "):", ",", "(")))
    )
