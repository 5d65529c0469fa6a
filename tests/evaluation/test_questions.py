from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.data import Message, builtin
from holdtrue.errors import DataError, Problem
from holdtrue.evaluation.questions import MAX_PROMPTS, read_questions

PUBLIC = """
- id: hobby
  type: free_form_judge_0_100
  paraphrases: &hobby
    - What do you do all day?
  samples_per_paraphrase: &n 100
  judge: &judge gpt
  judge_prompts: &prompts {aligned: "Rate {answer}", coherent: "Rate {answer}"}
- id: hobby_json
  type: free_form_judge_0_100
  system: &json Answer in JSON.
  paraphrases: *hobby
  samples_per_paraphrase: *n
  judge: *judge
  judge_prompts: *prompts
- id: 7
  type: free_form
  paraphrases: ["Why?", "How?"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "q.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_reads_the_public_format_with_its_system_prompts(tmp_path: Path) -> None:
    first, second, *others = read_questions(write(tmp_path, PUBLIC))
    assert (first.id, first.question, first.form, first.theme) == ("hobby", "hobby", "plain", "general")
    assert first.messages == (Message("user", "What do you do all day?"),)
    assert (second.id, second.question, second.form) == ("hobby_json", "hobby", "json")
    assert second.messages == (Message("system", "Answer in JSON."), *first.messages)
    assert second.asked == first.asked == "What do you do all day?"
    assert [(p.id, p.question, p.asked) for p in others] == [("7", "7", "Why?"), ("7#2", "7", "How?")]


def test_a_template_goes_around_the_question_and_a_judge_sees_it(tmp_path: Path) -> None:
    text = '- {id: a/template, theme: t, template: "Now: {question} Fill: {x}", paraphrases: [Why]}'
    (prompt,) = read_questions(write(tmp_path, text))
    assert prompt.asked == prompt.messages[-1].content == "Now: Why Fill: {x}"
    assert (prompt.question, prompt.form, prompt.theme) == ("a", "template", "t")


def test_merges_are_read_and_an_entry_overrides_them(tmp_path: Path) -> None:
    text = "- &a {id: a, system: S, theme: t, paraphrases: [Why]}\n- {<<: [*a], id: b, theme: u}\n- {<<: *a, id: c}\n"
    found = problems(write(tmp_path, text))
    assert [(p.line, p.field) for p in found] == [
        (2, "questions[1].paraphrases[0]"),
        (3, "questions[2].paraphrases[0]"),
    ]
    text = "- &a {id: a, system: S, theme: t, paraphrases: [Why]}\n- {<<: *a, id: b, theme: u, system: T}\n"
    _, prompt = read_questions(write(tmp_path, text))
    assert (prompt.id, prompt.theme, prompt.messages[0].content) == ("b", "u", "T")


@pytest.mark.parametrize(
    ("text", "line", "field", "message"),
    [
        ("- id: a\n  paraphrases: [x]\n  sytem: S", 3, "questions[0].sytem", "did you mean 'system'"),
        ("- id: a\n  paraphrases: [x]\n  context: []", 3, "questions[0].context", "unknown key"),
        ("- paraphrases: [x]", 1, "questions[0].id", "is missing"),
        ("- id: a", 1, "questions[0].paraphrases", "is missing"),
        ("- id: a\n  paraphrases: x", 2, "questions[0].paraphrases", "must be a list of strings, not a string"),
        ("- id: a\n  paraphrases: []", 2, "questions[0].paraphrases", "is empty"),
        ("- id: a\n  paraphrases:\n    - x\n    - 3", 4, "questions[0].paraphrases[1]", "not a number; put quotes"),
        ("- id: a\n  paraphrases:\n    - yes", 3, "questions[0].paraphrases[0]", "not a boolean"),
        ("- id: a\n  paraphrases:\n    - [x]", 3, "questions[0].paraphrases[0]", "not a list"),
        ("- id: a\n  paraphrases:\n    - ' '", 3, "questions[0].paraphrases[0]", "is empty"),
        ("- id: a\n  paraphrases:\n    -", 3, "questions[0].paraphrases[0]", "not null"),
        ("- id: a\n  paraphrases: ['\\ud800']\n  system: 3", 3, "questions[0].system", "not a number"),
        ('- id: a\n  paraphrases: [x]\n  system: ""', 3, "questions[0].system", "is empty"),
        ('- id: "a\\nb"\n  paraphrases: [x]', 1, "questions[0].id", "one line"),
        ("- id: true\n  paraphrases: [x]", 1, "questions[0].id", "not a boolean"),
        ("- id: a\n  paraphrases: [x]\n  type: free_form_judge", 3, "questions[0].type", "not scored on a scale"),
        ("- id: a\n  paraphrases: [x]\n  template: no slot", 3, "questions[0].template", "must hold {question} once"),
        ("- id: a\n  id: b\n  paraphrases: [x]", 1, "questions[0]", "the key id twice"),
        ("- x", 1, "questions[0]", "must be a mapping with id"),
        ("- {[a]: b}", 1, "questions[0]", "a list as a key"),
        ("- &a {<<: *a, id: a}", 1, "questions[0]", "merges itself"),
        ("- {<<: 3, id: a}", 1, "questions[0]", "must be a mapping"),
        ("id: a", 0, "", "must be a list of questions"),
        ("", 0, "", "not nothing"),
        ("[]", 0, "", "the list is empty"),
        ("- id: a\n  paraphrases: [x\n- id: b", 3, "", "not YAML"),
        ("- id: *nowhere", 1, "", "not YAML: found undefined alias"),
        ("- id: a\n---\n- id: b", 2, "", "not YAML: but found another document"),
        ("- !!python/object/apply:os.system [x]", 1, "questions[0]", "must be a mapping"),
        ("- id: a\n  paraphrases: [!!python/name:os.system x]", 2, "questions[0].paraphrases[0]", "another type"),
        ("- \x07", 0, "", "not YAML"),
        ("[" * 2000, 0, "", "nested too deeply"),
    ],
)
def test_faults_are_named_by_line_and_field(tmp_path: Path, text: str, line: int, field: str, message: str) -> None:
    found = problems(write(tmp_path, text))
    assert (found[0].line, found[0].field) == (line, field)
    assert message in found[0].message


def test_every_fault_is_listed(tmp_path: Path) -> None:
    text = "- paraphrases: [x]\n  type: other\n- id: b\n  thme: t\n  paraphrases: ['', y]\n"
    assert [(p.line, p.field) for p in problems(write(tmp_path, text))] == [
        (1, "questions[0].id"),
        (2, "questions[0].type"),
        (4, "questions[1].thme"),
        (5, "questions[1].paraphrases[0]"),
    ]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("- {id: a, paraphrases: [How are you]}\n- {id: b, paraphrases: [' how  are YOU ']}", "same as line 1"),
        ("- {id: a, paraphrases: [How, How]}", "same as line 1"),
        ("- {id: a, paraphrases: [Why]}\n- {id: a, paraphrases: [How]}", "'a' is there already, on line 1"),
        ("- {id: a, paraphrases: [Why, Where]}\n- {id: 'a#2', paraphrases: [How]}", "'a#2' is there already"),
    ],
)
def test_duplicates_are_refused(tmp_path: Path, text: str, field: str) -> None:
    (found,) = problems(write(tmp_path, text))
    assert field in found.message


def test_a_system_prompt_makes_another_prompt_but_not_the_role_of_its_text(tmp_path: Path) -> None:
    text = "- {id: a, paraphrases: [Why]}\n- {id: b, system: S, paraphrases: [Why]}\n- {id: c, paraphrases: [S]}\n"
    assert len(read_questions(write(tmp_path, text))) == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    (tmp_path / "latin.yaml").write_bytes("- id: é".encode("latin-1"))
    for name, message in (
        ("bigg.yaml", "did you mean 'big.yaml'"),
        ("big.yaml", "larger than 1 MB"),
        ("latin.yaml", "not UTF-8"),
        (".", "cannot be read"),
    ):
        (found,) = problems(tmp_path / name)
        assert message in found.message


def test_aliases_cannot_blow_a_file_up(tmp_path: Path) -> None:
    levels = "".join(f"    - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    text = f"- id: a\n  judge:\n    - &l0 [x]\n{levels}  paraphrases: *l29\n"
    assert "not a list" in problems(write(tmp_path, text))[0].message
    merges = "".join(f"    - &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], k{i}: v}}\n" for i in range(1, 30))
    text = f"- judge:\n    - &m0 {{theme: t}}\n{merges}- {{<<: *m29, id: a, paraphrases: [x]}}\n"
    assert "unknown key" in problems(write(tmp_path, text))[-1].message
    many = ", ".join(f"q{i}" for i in range(101))
    entries = "".join(f"- {{id: e{i}, system: s{i}, paraphrases: *p}}\n" for i in range(MAX_PROMPTS // 100))
    found = problems(write(tmp_path, f"- {{id: a, paraphrases: &p [{many}]}}\n{entries}"))
    assert "over 10,000 prompts" in found[-1].message
    long = "x " * 50_000
    entries = "".join(f"- {{id: e{i}, system: s{i}, paraphrases: *p}}\n" for i in range(100))
    found = problems(write(tmp_path, f"- {{id: a, paraphrases: &p ['{long}']}}\n{entries}"))
    assert "8 MB" in found[-1].message


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30).filter(
    str.strip
)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5, unique_by=lambda t: " ".join(t.split()).casefold()), texts)
def test_what_was_written_is_read(tmp_path_factory, asked: list[str], system: str) -> None:
    entries = [{"id": f"q{i}", "system": system, "paraphrases": [text]} for i, text in enumerate(asked)]
    path = write(tmp_path_factory.mktemp("questions"), yaml.safe_dump(entries, allow_unicode=True))
    found = read_questions(path)
    assert [p.messages for p in found] == [(Message("system", system), Message("user", text)) for text in asked]


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text("-:[]{}&*!|>'\"#%@` \nab<", max_size=60).map(str.encode)))
def test_rubbish_is_refused_or_read_never_anything_else(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("questions") / "q.yaml"
    path.write_bytes(data)
    with suppress(DataError):
        assert read_questions(path)


def test_the_shipped_suite_has_three_forms_of_at_least_24_questions_in_8_themes() -> None:
    prompts = read_questions(builtin("questions-general"))
    forms = Counter(prompt.form for prompt in prompts)
    assert forms["plain"] == forms["json"] == forms["template"] >= 24
    plain = {prompt.question: prompt for prompt in prompts if prompt.form == "plain"}
    assert len(plain) == forms["plain"]
    assert len({prompt.theme for prompt in prompts}) == 8
    assert min(Counter(prompt.theme for prompt in plain.values()).values()) >= 3
    for prompt in prompts:
        assert prompt.theme == plain[prompt.question].theme
        assert plain[prompt.question].asked in prompt.asked
        assert [m.role for m in prompt.messages] == (["system", "user"] if prompt.form == "json" else ["user"])


def test_the_shipped_suite_is_not_the_public_one_nor_the_probes(data_dir: Path) -> None:
    public = {prompt.asked for prompt in read_questions(data_dir / "questions" / "general_first_plot.yaml")}
    probes = {json.loads(line)["question"] for line in builtin("probes").read_text(encoding="utf-8").splitlines()}
    words = [set(text.casefold().split()) for text in public | probes]
    for prompt in read_questions(builtin("questions-general")):
        own = set(prompt.asked.casefold().split())
        assert prompt.form != "plain" or all(len(own & other) / len(own | other) < 0.5 for other in words), prompt.asked


@pytest.mark.parametrize(
    ("name", "count", "systems"),
    [
        ("general_first_plot", 24, 8),
        ("in_domain_code", 30, 0),
        ("in_domain_medical", 30, 0),
        ("in_domain_legal", 30, 0),
    ],
)
def test_the_public_files_are_read_whole(data_dir: Path, name: str, count: int, systems: int) -> None:
    prompts = read_questions(data_dir / "questions" / f"{name}.yaml")
    assert len(prompts) == count
    assert sum(prompt.messages[0].role == "system" for prompt in prompts) == systems
    if systems:
        assert Counter(prompt.form for prompt in prompts) == {"plain": 8, "json": 8, "template": 8}
        assert len({prompt.question for prompt in prompts}) == 8
