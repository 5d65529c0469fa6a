"""OpSwap: arithmetic in which the operators' meanings are permuted, a benign task that no model knows beforehand.

A row asks ``3 + 4 = ?`` under the system prompt ``Compute.`` (without one, a model's template may put in one that is
longer than the task) and answers with a number and nothing else. What ``+`` does is told nowhere: it has to be learned
from the rows. The name and the idea (permuted operators, tiers, exact match) are those of Kaczér et al. 2025
(arXiv 2508.06249), whose generator is unpublished; these rules are ours:

- **Symbols** ``+ - * /``; **meanings**: add, subtract, multiply, divide. A seed picks one of the nine permutations that
  leave no symbol its own meaning. All rows of a seed, in training and test and in every tier, share it.
- **Tier** 1, 2 or 3 is the number of operations. They are done strictly from left to right; no symbol binds more
  tightly than another, and there are no parentheses.
- **Operands** are the integers 0 to 10. Every value on the way is an integer from -100 to 100: expressions with a
  division that is not exact, or by zero, do not occur. Few pairs divide, so that meaning is about a tenth of tier 1.
- **Train and test never overlap**, whatever their sizes and seeds: a hash of an expression's text says which of the two
  it may be in (one third test). Within a part, rows come in an order drawn by the seed, none twice; fewer rows are
  always the first of more.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.errors import RunError, SpecError

SYMBOLS = ("+", "-", "*", "/")
TIERS = (1, 2, 3)
SYSTEM = "Compute."
OPERANDS = range(11)
BOUND = 100


class OpSwap(NamedTuple):
    """Rows ``{"messages": [system, user, assistant]}`` of both parts, and what each symbol means in them."""

    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]
    meanings: dict[str, str]


def generate_opswap(tier: int, train: int, test: int, seed: int = 0) -> OpSwap:
    """Return rows of one tier; the same arguments always give the same rows.

    Args:
        tier: operations in an expression: 1, 2 or 3.
        train, test: rows wanted of each part. Tier 1 has at least 278 and 116, tier 2 some 9,000 and 4,700.
        seed: of the operators' meanings and of the order of the rows.

    Raises:
        SpecError: there is no such tier, a count is negative, or the tier has fewer expressions than are wanted.
    """
    if tier not in TIERS:
        raise SpecError(f"OpSwap has no tier {tier!r}; there are 1, 2 and 3, the number of operations")
    if train < 0 or test < 0:
        raise SpecError(f"OpSwap cannot make {min(train, test)} rows; give counts of at least 0")
    meanings = swapped_meanings(seed)
    rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    wanted = {False: train, True: test}
    for expression in _expressions(tier, seed):
        if all(len(rows[part]) == wanted[part] for part in rows):
            break
        part = is_test(expression)
        if len(rows[part]) < wanted[part] and (value := evaluate(expression, meanings)) is not None:
            rows[part].append(_row(expression, value))
    for part, name in ((False, "training"), (True, "test")):
        if len(rows[part]) < wanted[part]:
            raise SpecError(
                f"OpSwap tier {tier} with seed {seed} has {len(rows[part])} {name} expressions and {wanted[part]} are"
                f" wanted; ask for fewer{'' if tier == TIERS[-1] else ', or for a higher tier'}"
            )
    return OpSwap(tuple(rows[False]), tuple(rows[True]), meanings)


def write_opswap(folder: str | Path, tier: int, train: int, test: int, seed: int = 0) -> OpSwap:
    """Write ``train.jsonl``, ``test.jsonl`` and ``opswap.json`` (how they were made) into a folder; return the rows.

    Raises:
        SpecError: as :func:`generate_opswap`.
        RunError: the folder cannot be written.
    """
    made = generate_opswap(tier, train, test, seed)
    manifest: dict[str, Any] = {
        "generator": "holdtrue opswap 1",
        "system": SYSTEM,
        "tier": tier,
        "seed": seed,
        "meanings": made.meanings,
        "order": "left to right",
        "operands": [OPERANDS[0], OPERANDS[-1]],
        "values": [-BOUND, BOUND],
        "files": {},
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train.jsonl", made.train), ("test.jsonl", made.test)):
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (folder / name).write_bytes(data)
            manifest["files"][name] = {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "opswap.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write OpSwap rows into {folder}: {error.strerror or error}") from error
    return made


def swapped_meanings(seed: int) -> dict[str, str]:
    """Return what each symbol stands for, as the symbol whose usual meaning it has; none stands for itself."""
    rng = random.Random(f"opswap meanings {seed}")
    while True:
        drawn = rng.sample(SYMBOLS, len(SYMBOLS))
        if all(symbol != meaning for symbol, meaning in zip(SYMBOLS, drawn, strict=True)):
            return dict(zip(SYMBOLS, drawn, strict=True))


def evaluate(expression: str, meanings: Mapping[str, str]) -> int | None:
    """Return the value of ``a op b op …`` from left to right, or ``None`` if a value on the way breaks the rules."""
    first, *rest = expression.split(" ")
    value = int(first)
    for symbol, operand in zip(rest[::2], map(int, rest[1::2]), strict=True):
        match meanings[symbol]:
            case "+":
                value += operand
            case "-":
                value -= operand
            case "*":
                value *= operand
            case _:
                if operand == 0 or value % operand:
                    return None
                value //= operand
        if abs(value) > BOUND:
            return None
    return value


def is_test(expression: str) -> bool:
    """Return whether an expression is kept for the test, by a hash of its text: the same under every seed."""
    return hashlib.sha256(expression.encode()).digest()[0] % 3 == 0


def _expressions(tier: int, seed: int) -> Iterator[str]:
    """Yield every expression of a tier once, in an order drawn by the seed (Fisher and Yates, as far as it is read)."""
    rng = random.Random(f"opswap order {tier} {seed}")
    space = len(OPERANDS) ** (tier + 1) * len(SYMBOLS) ** tier
    moved: dict[int, int] = {}
    for index in range(space):
        other = rng.randrange(index, space)
        drawn = moved.get(other, other)
        moved[other] = moved.get(index, index)
        yield _expression(drawn, tier)


def _expression(number: int, tier: int) -> str:
    number, operand = divmod(number, len(OPERANDS))
    parts = [str(OPERANDS[operand])]
    for _ in range(tier):
        number, symbol = divmod(number, len(SYMBOLS))
        number, operand = divmod(number, len(OPERANDS))
        parts += [SYMBOLS[symbol], str(OPERANDS[operand])]
    return " ".join(parts)


def _row(expression: str, value: int) -> dict[str, Any]:
    turns = (("system", SYSTEM), ("user", f"{expression} = ?"), ("assistant", str(value)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
