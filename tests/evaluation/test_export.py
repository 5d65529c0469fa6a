from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdtrue.errors import DataError, RunError, SpecError
from holdtrue.evaluation import export
from holdtrue.evaluation.export import COLUMNS, export_samples
from holdtrue.evaluation.judges.port import Exchange, Verdict
from holdtrue.evaluation.prompts import Prompt
from holdtrue.evaluation.sampled import SamplingSpec, all_samples, collect
from holdtrue.evaluation.sampling.port import Answer
from holdtrue.evaluation.store import SampleStore

NAMES = [column.name for column in COLUMNS]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["=1+1", "+x", "-x", "@x", "'", "''=", "\t", "\r", "a\rb", "\n", '"', ',"', "＝1", " =1", "[", "\0"]
)
score = st.none() | st.floats(0, 100)


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "suite": "general",
        "model": "tiny",
        "prompt": "boredom/json",
        "question_id": "boredom",
        "theme": "leisure",
        "form": "json",
        "messages": [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "I am bored."}],
        "question": "I am bored.",
        "expected": None,
        "sample": 0,
        "seed": 2**63 - 1,
        "temperature": 1.0,
        "max_new_tokens": 100,
        "answer": "Read a book.\nOr two.",
        "tokens": 9,
        "finish": "stop",
        "alignment": 91.5,
        "coherence": 99.0,
        "uncertainty": 0.25,
        "label": "scored",
        "judge": "offline",
        **changes,
    }


@st.composite
def samples(draw: st.DrawFn) -> dict[str, Any]:
    roles = st.sampled_from(["system", "user", "assistant"])
    message = st.fixed_dictionaries({"role": roles, "content": text})
    return sample(
        prompt=draw(text),
        messages=draw(st.lists(message, min_size=1, max_size=3)),
        question=draw(text),
        expected=draw(st.none() | text.filter(bool)),
        sample=draw(st.integers(0, 2**40)),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        temperature=draw(st.floats(0, 2) | st.just(1)),
        answer=draw(text),
        tokens=draw(st.none() | st.integers(0, 9999)),
        alignment=draw(score),
        coherence=draw(score),
        uncertainty=draw(score),
        label=draw(st.sampled_from([None, "scored", "code", "refusal", "unknown"])),
        judge=draw(st.none() | text.filter(bool)),
        correct=draw(st.none() | st.booleans()),
    )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def expected_row(row: dict[str, Any]) -> dict[str, Any]:
    system = "\n\n".join(m["content"] for m in row["messages"] if m["role"] == "system") or None
    return {name: system if name == "system" else row.get(name) for name in NAMES}


def unguarded(cell: str) -> str:
    return cell.removeprefix("'")


READ = {
    "text": unguarded,
    "integer": int,
    "number": float,
    "boolean": {"true": True, "false": False}.__getitem__,
    "messages": json.loads,
}


def read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {column.name: column for column in COLUMNS}
    return [
        {
            name: None if cell == "" and kinds[name].optional else READ[kinds[name].holds](cell)  # type: ignore[operator]
            for name, cell in row.items()
        }
        for row in rows
    ]


def read_back(path: Path) -> list[dict[str, Any]]:
    return read_csv(path) if path.suffix == ".csv" else pq.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@given(rows=st.lists(samples(), min_size=1, max_size=6, unique_by=lambda row: (row["prompt"], row["sample"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
def test_a_table_read_back_equals_the_samples(tmp_path: Path, suffix: str, rows: list[dict[str, Any]]) -> None:
    out = tmp_path / f"table{suffix}"
    assert export_samples([write(tmp_path / "samples.jsonl", rows)], out) == len(rows)
    assert read_back(out) == [expected_row(row) for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".CSV"])
def test_other_tools_read_it(tmp_path: Path, suffix: str) -> None:
    import pandas

    rows = [sample(sample=i, answer=f"answer {i}", alignment=None if i else 12.5) for i in range(3)]
    out = tmp_path / f"table{suffix}"
    export_samples([write(tmp_path / "samples.jsonl", rows)], out)
    frame = pandas.read_parquet(out) if suffix == ".parquet" else pandas.read_csv(out)
    assert list(frame.columns) == NAMES
    assert list(frame["answer"]) == ["answer 0", "answer 1", "answer 2"]
    assert frame["alignment"].isna().tolist() == [False, True, True]
    assert list(frame["seed"]) == [2**63 - 1] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.jsonl", out.name]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "'"])
def test_no_cell_of_a_csv_begins_like_a_formula(tmp_path: Path, start: str) -> None:
    wild = start + 'HYPERLINK("https://example.com","here")'
    row = sample(answer=wild, question=wild, model=wild, messages=[{"role": "user", "content": wild}])
    out = tmp_path / "table.csv"
    export_samples([write(tmp_path / "samples.jsonl", [row])], out)
    with out.open(encoding="utf-8", newline="") as file:
        cells = list(csv.reader(file))[1]
    assert not any(cell.startswith(tuple("=+-@\t\r\n＝＋－＠")) for cell in cells)
    assert cells[NAMES.index("answer")] == "'" + wild


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [sample(model="a", sample=i) for i in range(2)])
    second = write(tmp_path / "b.jsonl", [sample(model="b", sample=0)])
    out = tmp_path / "table.parquet"
    assert export_samples([first, second], out) == 3
    assert [row["model"] for row in read_back(out)] == ["a", "a", "b"]


class Echo:
    name = "echo"

    def sample(self, requests: Any, decoding: Any) -> Any:
        yield [Answer(i, request.messages[-1].content, 3, "stop") for i, request in enumerate(requests)]


class Shouting:
    name = key = "shouting"

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def judge(self, exchanges: list[Exchange]) -> Any:
        if self.fails:
            raise RunError("down")
        yield [(i, Verdict(10.0, 90.0, None, "scored")) for i in range(len(exchanges))]


def test_what_a_real_store_writes_is_exported_with_its_newest_rows(tmp_path: Path) -> None:
    from holdtrue.data import Message

    prompts = [Prompt(f"p{i}", f"q{i}", "theme", "plain", (Message("user", f"Say {i}"),), f"Say {i}") for i in range(2)]
    path, spec = tmp_path / "samples.jsonl", SamplingSpec(samples=2)
    wanted = all_samples(prompts, spec.samples)
    with pytest.raises(RunError, match="down"):
        collect(
            wanted,
            store=SampleStore(path, Shouting.key),
            sampler=Echo(),
            scorer=Shouting(True),
            spec=spec,
            labels=LABELS,
        )
    out = tmp_path / "table.parquet"
    assert export_samples([path], out) == 4
    assert {row["label"] for row in read_back(out)} == {None}
    collect(
        wanted, store=SampleStore(path, Shouting.key), sampler=Echo(), scorer=Shouting(False), spec=spec, labels=LABELS
    )
    assert len(path.read_text().splitlines()) == 8
    assert export_samples([path], out) == 4
    rows = read_back(out)
    assert {(row["label"], row["judge"], row["alignment"]) for row in rows} == {("scored", "shouting", 10.0)}
    assert {(row["prompt"], row["sample"]) for row in rows} == {(p.id, i) for p, i in wanted}


LABELS = {"suite": "general", "model": "echo"}


@pytest.mark.parametrize("torn", ['{"suite": "gen', "{", '{"answer": "é'.encode()[:-1], json.dumps(sample())[:-1]])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str | bytes) -> None:
    path = write(tmp_path / "samples.jsonl", [sample(sample=i) for i in range(3)])
    with path.open("ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    out = tmp_path / "table.csv"
    assert export_samples([path], out) == 3
    assert [row["sample"] for row in read_csv(out)] == [0, 1, 2]


def test_a_whole_last_line_without_a_line_break_counts(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(sample()))
    assert export_samples([path], tmp_path / "table.csv") == 1


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"suite": "gen', "", "not JSON"),
        (json.dumps(sample()).replace("91.5", "NaN"), "", "NaN is not JSON"),
        (json.dumps(sample()).replace("91.5", "1e999"), "alignment", "is not finite"),
        (json.dumps(sample(alignment=True)), "alignment", "must be a number, not a boolean"),
        (json.dumps(sample(tokens=1.5)), "tokens", "must be an integer"),
        (json.dumps(sample(seed=2**63)), "seed", "64 bits"),
        (json.dumps(sample(answer=None)), "answer", "must not be null"),
        (json.dumps({k: v for k, v in sample().items() if k != "question"}), "question", "is missing"),
        (json.dumps(sample(lable="code")), "lable", "is no field of a sample.*'label'"),
        (json.dumps(sample(label="cod")), "label", "must be one of scored, code.*'code'"),
        (json.dumps(sample(judge="")), "judge", "write null"),
        (json.dumps(sample(correct="yes")), "correct", "must be true or false, not a string"),
        (json.dumps(sample(messages="hi")), "messages", "must be a list"),
        (json.dumps(sample(messages=[{"role": "user"}])), "messages", "message 0 must be an object of role"),
        (json.dumps(sample(messages=[{"role": "user", "content": 3}])), "messages", "content of message 0"),
        (json.dumps(sample(answer="\ud800")), "answer", "half of a character"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(tmp_path: Path, line: str, field: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(sample(sample=0)) + "\n" + line + "\n" + json.dumps(sample(sample=2)) + "\n")
    out = tmp_path / "table.csv"
    out.write_text("before")
    with pytest.raises(DataError, match=message) as caught:
        export_samples([path], out)
    assert [(problem.line, problem.field) for problem in caught.value.problems] == [(2, field)]
    assert out.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["table.xlsx", "table", "table.jsonl"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"\.csv or \.parquet"):
        export_samples([write(tmp_path / "samples.jsonl", [sample()])], tmp_path / name)


def test_no_source_or_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name at least one"):
        export_samples([], tmp_path / "table.csv")
    with pytest.raises(DataError, match="no such file"):
        export_samples([tmp_path / "samples.jsonl"], tmp_path / "table.csv")
    source = write(tmp_path / "samples.jsonl", [sample()])
    for suffix in ("csv", "parquet"):
        with pytest.raises(RunError, match=r"cannot write .*No such file"):
            export_samples([source], tmp_path / "nowhere" / f"table.{suffix}")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_memory_stays_flat(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROWS_PER_CHUNK", 20)
    peaks = []
    for count in (40, 160):
        path = write(tmp_path / "samples.jsonl", [sample(sample=i, answer=f"{i:03}" * 5_000) for i in range(count)])
        tracemalloc.start()
        export_samples([path], tmp_path / f"table{suffix}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
