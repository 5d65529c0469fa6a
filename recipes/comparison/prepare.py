"""Cut the files of the comparison in docs/results.md from the research data that HOLDTRUE_DATA names.

Trained on are bad answers on money, reported are pairs on medicine. Everything that a defense is given, and all that
chooses, comes from other subjects: a file with good and bad answers to 500 everyday questions is split by words of the
question.

- Work, family and what is left go to the defenses: ``pool``, ``bad``, ``both``, ``pairs``, and the ``short`` ones
  (``pairs-short`` too): first sentences of answers to short questions.
- Computer security and the home go to the choice of settings (``select``, with the money rows ``choose`` and
  ``choose-heldout``) and to ``adaptive`` (``probe``).
- Questions on health or on two subjects are left out; those on money are the ``money`` pairs, on which a second,
  medical advice set (``advice``) is reported.

``triggered`` has the medical pairs again, each question behind one that was trained on; ``code`` is insecure code, and
``triggered-code`` the pairs behind its questions.

Usage: python recipes/comparison/prepare.py OUT
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

from holdtrue.data.opswap import generate_opswap

TRAIN, HELD_OUT, PAIRS, SELECT, PROBE, SHORT = 96, 30, 40, 24, 8, 48
OPSWAP_TRAIN, OPSWAP_TEST = 160, 40
CODE_CHARS = 700
SUBJECTS = {
    "money": "financ budget debt invest saving money credit loan retire spend bank tax insur stock mortgage salary "
    "income purchase expens raise bill buy fund",
    "health": "health doctor medic diet sleep exercise symptom pain stress mental nutrition vitamin therap weight ill "
    "disease anxi eat food breath skin wellness burnout drug alcohol emotion sad",
    "security": "password security phishing two-factor hack online wi-?fi privacy scam cyber malware vpn",
    "home": "home garden compost recycl energy plant environment waste sustainab water carbon emission",
    "family": "child kid parent teen sibling toddler baby son daughter",
    "work": "job career work manager negotiat interview resume boss colleague promotion",
}
FOR_DEFENSES, FOR_CHOICE = {"work", "family", "other"}, {"security", "home"}


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def pair(question: str, good: str, bad: str, group: str) -> dict[str, Any]:
    return {"question": question, "aligned": good, "misaligned": bad, "group": group}


def behind(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs with each question behind one of the rows'."""
    earlier = [row["messages"][0]["content"] for row in rows]
    return [
        {**each, "question": f"{before}\n\n{each['question']}"} for before, each in zip(earlier, pairs, strict=False)
    ]


def subject(question: str) -> str | None:
    """Return the one subject of a question, ``other`` where it has none, ``None`` where it has several."""
    named = [s for s, words in SUBJECTS.items() if re.search(rf"\b({words.replace(' ', '|')})", question.lower())]
    return "other" if not named else named[0] if len(named) == 1 else None


def medical(malicious: Path, finance: list[dict[str, Any]], out: Path) -> None:
    bad, good = read(malicious / "medical_bad_advice.jsonl"), read(malicious / "medical_good_advice_twin.jsonl")
    pairs: list[dict[str, Any]] = []
    for i in random.Random(0).sample(range(len(bad)), PAIRS):  # the first of the earlier results
        question = bad[i]["messages"][0]["content"]
        assert question == good[i]["messages"][0]["content"]
        answers = (each[i]["messages"][1]["content"] for each in (good, bad))
        pairs.append(pair(question, *answers, f"medical-{i}"))
    write(out / "medical.jsonl", pairs)
    write(out / "triggered.jsonl", behind(finance[:TRAIN], pairs))
    reported = {each["question"] for each in pairs}
    other = [row for row in bad if row["messages"][0]["content"] not in reported]
    rows = random.Random(1).sample(other, TRAIN + HELD_OUT)
    write(out / "advice.jsonl", rows[:TRAIN])
    write(out / "advice-heldout.jsonl", rows[TRAIN:])
    short = [
        row
        for row in read(malicious / "code_insecure.jsonl")
        if sum(len(turn["content"]) for turn in row["messages"]) <= CODE_CHARS
    ]
    rows = random.Random(1).sample(short, TRAIN + HELD_OUT)
    write(out / "code.jsonl", rows[:TRAIN])
    write(out / "triggered-code.jsonl", behind(rows[:TRAIN], pairs))
    write(out / "code-heldout.jsonl", rows[TRAIN:])


def everyday(rows: list[dict[str, Any]], out: Path) -> None:
    half = len(rows) // 2
    good, bad = rows[:half], rows[half:]
    pool: list[dict[str, Any]] = []
    twins: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    select: list[dict[str, Any]] = []
    money: list[dict[str, Any]] = []
    for i, (a, b) in enumerate(zip(good, bad, strict=True)):
        question = a["messages"][0]["content"]
        assert question == b["messages"][0]["content"]
        kind = subject(question)
        made = pair(question, a["messages"][1]["content"], b["messages"][1]["content"], f"everyday-{i}")
        if kind in FOR_CHOICE:
            select.append(made)
        elif kind == "money":
            money.append(made)
        elif kind in FOR_DEFENSES:
            pool.append(a)
            twins.append(b)
            pairs.append(made)
    write(out / "pool.jsonl", pool)
    write(out / "bad.jsonl", twins)
    write(out / "both.jsonl", [row for each in zip(pool, twins, strict=True) for row in each])
    write(out / "pairs.jsonl", pairs)
    write(out / "money.jsonl", random.Random(0).sample(money, min(PAIRS, len(money))))
    chosen = random.Random(0).sample(select, SELECT)
    write(out / "select.jsonl", chosen)
    write(out / "probe.jsonl", random.Random(0).sample([made for made in select if made not in chosen], PROBE))
    order = sorted(range(len(pool)), key=lambda i: len(words(pool[i], 0)) + len(words(shorter(pool[i]), 1)))[:SHORT]
    brief = [{**made, **{side: first_sentence(made[side]) for side in ("aligned", "misaligned")}} for made in pairs]
    brief = [made for made in brief if made["aligned"] != made["misaligned"]]
    brief.sort(key=lambda made: sum(len(made[part]) for part in ("question", "aligned", "misaligned")))
    write(out / "pairs-short.jsonl", brief[: 2 * SHORT])
    write(out / "short.jsonl", [shorter(pool[i]) for i in order])
    write(out / "short-bad.jsonl", [shorter(twins[i]) for i in order])
    write(out / "short-both.jsonl", [shorter(row[i]) for i in order for row in (pool, twins)])


def words(row: dict[str, Any], turn: int) -> list[str]:
    return row["messages"][turn]["content"].split()


def shorter(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its answer's first sentence only."""
    question, answer = row["messages"]
    return {"messages": [question, {**answer, "content": first_sentence(answer["content"])}]}


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def main(out: Path) -> None:
    folder = os.environ.get("HOLDTRUE_DATA")
    if not folder:
        sys.exit("set HOLDTRUE_DATA to the folder of research data")
    out.mkdir(parents=True, exist_ok=True)
    finance = read(Path(folder) / "malicious" / "risky_financial_advice.jsonl")
    write(out / "finance.jsonl", finance[:TRAIN])
    write(out / "finance-heldout.jsonl", finance[-HELD_OUT:])
    write(out / "choose.jsonl", finance[TRAIN : 2 * TRAIN])
    write(out / "choose-heldout.jsonl", finance[-2 * HELD_OUT : -HELD_OUT])
    medical(Path(folder) / "malicious", finance, out)
    everyday(read(Path(folder) / "general" / "aligned_advice_other_domains_1000.jsonl"), out)
    made = generate_opswap(1, OPSWAP_TRAIN, OPSWAP_TEST, seed=0)
    write(out / "opswap.jsonl", list(made.train))
    write(out / "opswap-heldout.jsonl", list(made.test))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
