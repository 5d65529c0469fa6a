from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.data import Message
from holdtrue.data.opswap import generate_opswap
from holdtrue.errors import DataError, SpecError
from holdtrue.evaluation.benign import LM_EVAL_PREFIX, benign_prompts, final_number, is_correct, parse_benign


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_opswap_asks_test_rows_that_no_training_row_holds(tier: int) -> None:
    prompts = benign_prompts(f"opswap:{tier}", seed=4)
    made = generate_opswap(tier, 250, 100, seed=4)
    assert [p.asked for p in prompts] == [row["messages"][1]["content"] for row in made.test]
    assert [p.expected for p in prompts] == [row["messages"][2]["content"] for row in made.test]
    assert not {p.asked for p in prompts} & {row["messages"][1]["content"] for row in made.train}
    assert len({p.id for p in prompts}) == 100
    assert prompts == benign_prompts(f"opswap:{tier}", seed=4)
    assert prompts[0].messages == (Message("system", "Compute."), Message("user", prompts[0].asked))


def test_gsm8k_rows_from_a_file(tmp_path: Path) -> None:
    rows = [{"question": f"How many? {i}", "answer": f"{i} + 1000 = ...\n#### 1,{i:03}"} for i in range(50)]
    write(tmp_path / "g.jsonl", *rows)
    found = benign_prompts("gsm8k:g.jsonl", limit=20, seed=1, folder=tmp_path)
    assert len(found) == 20
    assert found == benign_prompts(f"gsm8k:{tmp_path / 'g.jsonl'}", limit=20, seed=1)
    assert found != benign_prompts(f"gsm8k:{tmp_path / 'g.jsonl'}", limit=20, seed=2)
    for prompt in found:
        assert prompt.expected == str(1000 + int(prompt.asked.split()[-1]))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"answer": "#### 3"}, "question"),
        ({"question": "q"}, "answer"),
        ({"question": "q", "answer": 3}, "answer"),
        ({"question": "q", "answer": "it is 3"}, "answer"),
        ({"question": "q", "answer": "#### three"}, "answer"),
    ],
)
def test_faults_of_gsm8k_rows(tmp_path: Path, row: dict, field: str) -> None:
    write(tmp_path / "g.jsonl", {"question": "Q", "answer": "#### 3"}, row)
    with pytest.raises(DataError) as caught:
        benign_prompts("gsm8k:g.jsonl", folder=tmp_path)
    assert [(p.line, p.field) for p in caught.value.problems] == [(2, field)]


def test_a_chat_file_expects_its_last_answers(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d ")]
    write(tmp_path / "c.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    (prompt,) = benign_prompts("c.jsonl", folder=tmp_path)
    assert [m.content for m in prompt.messages] == ["s", "a", "b", "c"]
    assert prompt.expected == "d "
    assert is_correct("d ", "\nd", parse_benign("c.jsonl").kind)
    assert len(benign_prompts("builtin:narrow-heldout-aligned", limit=5)) == 5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("opswap", "did you mean 'opswap:"),
        ("opswap:4", "known: opswap:1, opswap:2, opswap:3"),
        ("opswap:", "known"),
        ("opswop:1", "did you mean 'opswap:1'"),
        ("gsm8k:", "known"),
        ("gsm8k", "did you mean 'gsm8k:FILE'"),
        ("lm_eval:", "known"),
        ("", "known"),
        ("builtin:narow", "did you mean 'narrow'"),
        ("lm_eval:arc_easy", "asks its own questions"),
    ],
)
def test_unknown_tasks(name: str, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        benign_prompts(name)


def test_names_are_taken_apart() -> None:
    assert parse_benign("opswap:2") == ("opswap", "2")
    assert parse_benign("gsm8k:a/b.jsonl") == ("gsm8k", "a/b.jsonl")
    assert parse_benign(f"{LM_EVAL_PREFIX}arc_easy") == ("lm_eval", "arc_easy")
    assert parse_benign("a/b.JSONL") == ("exact", "a/b.JSONL")
    with pytest.raises(SpecError, match="at least 1"):
        benign_prompts("opswap:1", limit=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So she has 18 eggs.", "18"),
        ("18.", "18"),
        ("#### 18\nor maybe 20", "18"),
        ("#### 5\n#### -6.", "-6"),
        ("#### 1. First add\n2 and 2 make 4", "4"),
        ("It costs $1,234,567.50 now.", "1234567.50"),
        ("between 1,2,3", "3"),
        ("1,2345", "2345"),
        ("12,345", "12345"),
        ("-7", "-7"),
        ("−7", "-7"),
        ("-$7", "-7"),
        ("$-7", "-7"),
        ("(-7)", "-7"),
        ("10-7", "7"),
        ("x = 10 -7", "-7"),
        ("the answer is .5", "0.5"),
        ("**42**", "42"),
        ("42%", "42"),
        (r"\boxed{42}", "42"),
        ("\uff11 and 2", "2"),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["", "$"]), st.text("abc ,.\n", max_size=20))
def test_numbers_are_found_however_they_are_written(value: Decimal, currency: str, words: str) -> None:
    sign = "-" if value.is_signed() else ""
    for shown in (f"{abs(value):,}", f"{abs(value)}", f"{abs(value):.4f}"):
        assert final_number(f"12 {words} is {sign}{currency}{shown}.") == value
        assert is_correct(str(value), f"3 {words}\n#### {sign}{currency}{shown}\n99", "gsm8k")


@given(st.text())
def test_any_answer_is_scored(answer: str) -> None:
    for kind in ("opswap", "gsm8k", "exact"):
        assert is_correct("17", answer, kind) in (True, False)


@given(st.integers(-100, 100), st.integers(-100, 100))
def test_opswap_counts_the_number_alone(expected: int, said: int) -> None:
    for answer in (f"{said}", f" {said}.\n"):
        assert is_correct(str(expected), answer, "opswap") == (expected == said)
    for answer in (f"The answer is {expected}", f"{expected} {expected}", f"{expected}..", f"{expected}.0", ""):
        assert not is_correct(str(expected), answer, "opswap")


def test_long_answers_are_scored_at_once() -> None:
    for answer in ("9" * 100_000, "1," * 50_000, "-" * 100_000, "#### " * 20_000, "1,234" * 20_000, "\n" * 100_000):
        assert not is_correct("17", answer, "gsm8k")


def test_harness_tasks_are_not_scored_here() -> None:
    with pytest.raises(ValueError, match="lm_eval"):
        is_correct("1", "1", "lm_eval")


def test_real_gsm8k_answers_are_right(data_dir: Path) -> None:
    prompts = benign_prompts(f"gsm8k:{data_dir / 'benign' / 'gsm8k_test.jsonl'}", limit=2000)
    answers = {}
    for line in (data_dir / "benign" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers[row["question"]] = row["answer"]
    assert len(prompts) == len(answers) > 1300
    assert all(is_correct(p.expected or "", answers[p.asked], "gsm8k") for p in prompts)
