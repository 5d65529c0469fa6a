"""What every sampler makes of a model's raw text."""

from __future__ import annotations


def answer_text(text: str) -> str:
    """Return the text without white space around it, and such that it can be written as UTF-8.

    Two halves of a surrogate pair become the character that they stand for, a lone half U+FFFD.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip()
