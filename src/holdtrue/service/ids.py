"""Identifiers: opaque, unguessable, told apart by prefix; and the names of tuned models."""

from __future__ import annotations

import re
import secrets
from typing import Literal

Kind = Literal[
    "org",
    "proj",
    "key",
    "file",
    "upload",
    "part",
    "ftjob",
    "ftevent",
    "ftckpt",
    "model",
    "policy",
    "gate",
    "receipt",
    "chatcmpl",
    "req",
]

_TOKEN = r"[A-Za-z0-9]{24}"
SUFFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a customer may write into a model's name; anything else is refused, not cleaned."""
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def _token(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new(kind: Kind) -> str:
    """Return a fresh id such as ``file-…`` with 142 bits of randomness."""
    return f"{kind}-{_token(24)}"


def is_id(kind: Kind, text: str) -> bool:
    """Whether a text from outside has the form of an id of this kind."""
    return re.fullmatch(rf"{kind}-{_TOKEN}", text) is not None


def model_name(base: str, organization: str, suffix: str | None, *, step: int | None = None, tag: str = "") -> str:
    """Return ``ft:base:org:suffix:id``, with ``:ckpt-step-N`` behind it for a checkpoint.

    Args:
        base: alias of the base model; a hub id's slash becomes a dash.
        organization: its slug.
        suffix: what the customer asked for; must match ``SUFFIX`` or be ``None``.
        step: a checkpoint's optimizer step.
        tag: the eight letters that tell models of one suffix apart; drawn when empty.
    """
    name = f"ft:{base.replace('/', '-')}:{organization}:{suffix or ''}:{tag or _token(8)}"
    return name if step is None else f"{name}:ckpt-step-{step}"
