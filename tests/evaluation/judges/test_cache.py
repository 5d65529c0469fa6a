from __future__ import annotations

import itertools
import multiprocessing
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from holdtrue.errors import BudgetError, RunError
from holdtrue.evaluation.judges import CachedJudge, Estimate, Exchange, Verdict
from holdtrue.evaluation.judges.reading import UNHEARD


class Lengths:
    """A judge for tests: scores an answer by its length, in batches of two, last first."""

    def __init__(self, key: str = "lengths", name: str = "lengths", limit: int = 10**9) -> None:
        self.key, self.name, self.limit = key, name, limit
        self.asked: list[Exchange] = []

    def estimate(self, exchanges: Sequence[Exchange]) -> Estimate:
        return Estimate(len(exchanges), 0, None)

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        order = list(range(len(exchanges)))[::-1]
        for start in range(0, len(order), 2):
            if len(self.asked) >= self.limit:
                raise BudgetError("spent")
            part = order[start : start + 2]
            self.asked += [exchanges[index] for index in part]
            yield [(index, self.verdict(exchanges[index])) for index in part]

    def verdict(self, exchange: Exchange) -> Verdict:
        if "lost" in exchange.answer:
            return UNHEARD
        if "odd" in exchange.answer:
            return Verdict(None, 3.0, 1.0, "unknown")
        return Verdict(float(len(exchange.answer)), 1 / 3, None, "scored")


def judged(judge: CachedJudge, asked: Sequence[Exchange]) -> list[Verdict]:
    found = list(itertools.chain.from_iterable(judge.judge(asked)))
    assert sorted(index for index, _ in found) == list(range(len(asked)))
    return [verdict for _, verdict in sorted(found)]


ASKED = [Exchange("q", "a" * n) for n in (1, 2, 3, 2, 1)] + [Exchange("r", "a"), Exchange("q", "odd \ud800\x00")]


def test_each_exchange_is_judged_once_ever(tmp_path: Path) -> None:
    inner = Lengths()
    first = judged(CachedJudge(inner, tmp_path / "new" / "folder"), ASKED)
    assert len(inner.asked) == len(set(ASKED)) == len(set(inner.asked))
    assert first == [inner.verdict(exchange) for exchange in ASKED]
    later = Lengths()
    assert judged(CachedJudge(later, tmp_path / "new" / "folder"), ASKED[::-1]) == first[::-1]
    assert later.asked == []


def test_what_differs_in_key_question_or_answer_is_another(tmp_path: Path) -> None:
    judged(CachedJudge(Lengths(key="k"), tmp_path), [Exchange("ab", "c")])
    for key, exchange in (("j", Exchange("ab", "c")), ("k", Exchange("a", "bc")), ("ka", Exchange("b", "c"))):
        inner = Lengths(key=key)
        judged(CachedJudge(inner, tmp_path), [exchange])
        assert inner.asked == [exchange]


def test_an_answer_of_which_nothing_was_learned_is_asked_about_again(tmp_path: Path) -> None:
    asked = [Exchange("q", "lost"), Exchange("q", "odd")]
    inner = Lengths()
    for _ in range(2):
        assert [v.label for v in judged(CachedJudge(inner, tmp_path), asked)] == ["unknown", "unknown"]
    assert [exchange.answer for exchange in inner.asked].count("lost") == 2
    assert [exchange.answer for exchange in inner.asked].count("odd") == 1


def test_what_was_done_before_a_stop_is_kept(tmp_path: Path) -> None:
    asked = [Exchange("q", "a" * n) for n in range(1, 11)]
    stopping = Lengths(limit=4)
    with pytest.raises(BudgetError):
        judged(CachedJudge(stopping, tmp_path), asked)
    found = CachedJudge(Lengths(), tmp_path).judge(asked)
    next(found)
    next(found)
    found.close()  # as a kill between two batches
    inner = Lengths()
    judged(CachedJudge(inner, tmp_path), asked)
    assert len(inner.asked) == 4


def test_the_estimate_leaves_out_what_is_kept(tmp_path: Path) -> None:
    judge = CachedJudge(Lengths(), tmp_path)
    assert judge.estimate(ASKED) == Estimate(5, 0, None)
    judged(judge, ASKED[:2])
    assert judge.estimate(ASKED) == Estimate(3, 0, None)


def test_the_name_is_that_of_the_judge_that_gave_the_verdicts(tmp_path: Path) -> None:
    class Renamed(Lengths):
        def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
            self.name = "lengths (5 samples)"  # found out when it was first asked
            yield from super().judge(exchanges)

    judge = CachedJudge(Renamed(), tmp_path)
    assert judge.name == "lengths"
    judged(judge, ASKED)
    assert judge.name == "lengths (5 samples)"
    later = CachedJudge(Renamed(), tmp_path)
    judged(later, ASKED)
    assert later.name == "lengths (5 samples)"


def work(folder: Path, start: int) -> None:
    judged(CachedJudge(Lengths(), folder), [Exchange("q", "a" * n) for n in range(start, start + 60)])


def test_two_processes_share_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, start)) for start in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with sqlite3.connect(tmp_path / "verdicts.sqlite3") as database:
        assert database.execute("SELECT count(*) FROM verdicts").fetchone() == (100,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdicts.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(RunError, match=r"verdicts\.sqlite3.*delete the file"):
        judged(CachedJudge(Lengths(), tmp_path), ASKED)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be read or written"):
        judged(CachedJudge(Lengths(), tmp_path / "file" / "x"), ASKED)


def test_nothing_to_judge_touches_nothing(tmp_path: Path) -> None:
    assert judged(CachedJudge(Lengths(), tmp_path / "x"), []) == []
    assert not (tmp_path / "x").exists()
