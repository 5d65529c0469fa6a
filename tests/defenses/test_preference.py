"""Preference: the hinge on pairs' margins against a naive one on whole logits, and what it holds in a real trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from holdtrue.defenses import Defense, GradientContext, Needs, RowsContext
from holdtrue.defenses.preference import Preference
from holdtrue.errors import DataError, NeedError
from holdtrue.models import causal_lm, without_adapter
from holdtrue.training import DefendedTrainer, ReferenceCache
from holdtrue.training import pairs as pairs_module
from support import small_model, small_pairs, small_rows, write_rows


def train(
    tmp_path: Path,
    defenses: list[Any],
    rows: Any,
    model: Any = None,
    reference_cache: ReferenceCache | None = None,
    **values: Any,
) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"num_train_epochs": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        **settings | values,
    )  # fmt: skip
    trainer = DefendedTrainer(
        model or small_model(), arguments, train_dataset=rows, defenses=defenses, reference_cache=reference_cache
    )
    trainer.train()
    return [r for r in trainer.state.log_history if "loss" in r]


def both(pairs: datasets.Dataset) -> datasets.Dataset:
    return datasets.concatenate_datasets([small_rows(), pairs])


def margins(model: Any, pairs: datasets.Dataset) -> list[torch.Tensor]:
    """Each pair's margin, from whole logits, a row at a time."""
    means = []
    for row in pairs:
        ids, wanted = torch.tensor([row["input_ids"]]), torch.tensor(row["trained"])[1:]
        found = causal_lm(model)(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        means.append(found.gather(-1, ids[0, 1:, None]).squeeze(-1)[wanted].mean())
    return [a - b for a, b in zip(means[0::2], means[1::2], strict=True)]


class Witness(Defense):
    """Compares what it is given with a naive computation, and looks at its own gradients afterwards."""

    name, badge, paper = "witness", "variant", "none"

    def needs(self) -> Needs:
        return Needs(pairs="given")

    def gradient(self, context: GradientContext) -> None:
        model, pairs = MODEL["model"], MODEL["pairs"]
        before = {n: p.grad.clone() for n, p in context.parameters.items() if p.grad is not None}
        assert context.pair_gradient is not None
        assert context.pairs == len(pairs) // 2
        found = context.pair_gradient([2, 0], lambda policy, reference: (reference - policy + 0.7).square())
        assert all(torch.equal(context.parameters[n].grad, g) for n, g in before.items())  # type: ignore[arg-type]
        with torch.no_grad(), without_adapter(model):
            reference = margins(model, pairs)
        policy = margins(model, pairs)
        naive = torch.stack([(reference[i] - policy[i] + 0.7).square() for i in (2, 0)]).mean()
        gradients = torch.autograd.grad(naive, list(context.parameters.values()))
        SEEN.append((found, naive.item(), gradients))


SEEN: list[Any] = []
MODEL: dict[str, Any] = {}


def test_the_gradient_is_that_of_the_naive_way(tmp_path: Path) -> None:
    SEEN.clear()
    MODEL.update(model=small_model(), pairs=small_pairs())
    train(tmp_path, [Witness()], both(MODEL["pairs"]), MODEL["model"])
    assert len(SEEN) == 12
    for found, mean, gradients in SEEN:
        assert found.mean == pytest.approx(mean, abs=1e-5)
        for ours, theirs in zip(found.gradient.values(), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def context(step: int, policy: list[float], reference: list[float], asked: list[Any]) -> GradientContext:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)

    def pair_gradient(chosen: Any, term: Any) -> Any:
        from holdtrue.defenses import PairGradient

        asked.append(list(chosen))
        margins = torch.tensor([policy[i] for i in chosen], requires_grad=True)
        mean = term(margins, torch.tensor([reference[i] for i in chosen])).mean()
        (slope,) = torch.autograd.grad(mean, margins)
        return PairGradient(float(mean.detach()), {"w": torch.full((2,), float(slope.sum()))})

    return GradientContext({"w": weight}, step, None, len(policy), pair_gradient)


def test_only_what_fell_below_the_reference_is_pulled_up() -> None:
    asked: list[Any] = []
    defense = Preference(weight=3.0, count=2)
    given = context(0, [0.5, 0.1], [0.2, 0.4], asked)  # the first is above its reference, the second 0.3 below
    defense.gradient(given)
    assert given.metrics["preference_short"] == pytest.approx(0.15)
    # Half of the pairs, slope -1 each, times 3.
    assert given.parameters["w"].grad.tolist() == pytest.approx([1 - 1.5] * 2)  # type: ignore[union-attr]
    content = context(0, [0.5, 0.5], [0.2, 0.4], asked)
    defense.gradient(content)
    assert content.parameters["w"].grad.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    untouched = context(0, [0.2, 0.4], [0.2, 0.4], asked)
    defense.gradient(untouched)
    assert untouched.parameters["w"].grad.tolist() == [1.0, 1.0]  # type: ignore[union-attr]


def test_steps_take_the_pairs_in_turn_and_rare_ones_weigh_more() -> None:
    asked: list[Any] = []
    for step in range(7):
        given = context(step, [0.0] * 5, [1.0] * 5, asked)
        Preference(weight=1.0, count=2, every=3).gradient(given)
        change = 0.0 if step % 3 else -3.0
        assert given.parameters["w"].grad.tolist() == pytest.approx([1 + change] * 2)  # type: ignore[union-attr]
    assert asked == [[0, 1], [2, 3], [4, 0]]


@pytest.mark.parametrize(
    ("first", "every", "acting"), [(3, 1, {1: [0], 2: [1], 3: [2]}), (4, 2, {1: [0], 3: [1]}), (1, 5, {1: [0]})]
)
def test_only_the_first_steps_act_where_that_is_asked_for(first: int, every: int, acting: dict[int, list[int]]) -> None:
    found: dict[int, list[int]] = {}
    for step in range(9):
        asked: list[Any] = []
        given = context(step, [0.0] * 5, [1.0] * 5, asked)
        Preference(first=first, every=every).gradient(given)
        moved = given.parameters["w"].grad.tolist() != [1.0, 1.0]  # type: ignore[union-attr]
        assert moved == bool(asked)
        if asked:
            found[step] = asked[0]
    assert found == acting


def test_a_run_without_first_steps_is_told_as_before_there_were_any() -> None:
    assert "first" not in Preference().model_dump()
    assert Preference(first=6).model_dump()["first"] == 6
    assert Preference.model_validate(Preference(first=6).model_dump()) == Preference(first=6)


def test_it_holds_the_margin_of_its_pairs(tmp_path: Path) -> None:
    pairs = small_pairs()

    def drift(defenses: list[Any]) -> float:
        model = small_model()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
        # What is trained on is each pair's misaligned answer.
        rows = datasets.Dataset.from_list([{**row, "kind": 0, "ce": True} for row in list(pairs)[1::2] * 4])
        train(tmp_path, defenses, datasets.concatenate_datasets([rows, pairs]), model, num_train_epochs=6)
        with torch.no_grad():
            own = margins(model.eval(), pairs)
            with without_adapter(model):
                before = margins(model, pairs)
        return float(torch.stack(before).mean() - torch.stack(own).mean())

    plain = drift([])
    assert plain > 0.2
    assert drift([Preference(weight=3.0, count=3)]) < 0.5 * plain


def test_many_pairs_of_a_step_take_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = pairs_module.final_hidden
    monkeypatch.setattr(pairs_module, "final_hidden", lambda lm, ids: (sizes.append(len(ids)), read(lm, ids))[1])
    train(tmp_path, [Preference(slack=1.0, count=3)], both(small_pairs()), max_steps=2)
    assert sizes
    assert set(sizes) == {2}


def test_the_references_margins_are_kept_for_other_runs(tmp_path: Path) -> None:
    """With the same adapter afterwards, to the bit, whether they were computed or recalled."""
    ends = []
    for at, place in enumerate(("", "cache", "cache")):
        model = small_model()
        cache = ReferenceCache(tmp_path / place, limit_bytes=2**20, namespace="t") if place else None
        train(tmp_path, [Preference(count=2)], both(small_pairs()), model, reference_cache=cache, max_steps=4)
        ends.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora" in n]))
        if cache is not None:
            stats = cache.stats()
            assert (stats.hits, stats.misses) == ((0, 3) if at == 1 else (3, 0))
            cache.close()
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_what_is_no_pair_stops_it(tmp_path: Path) -> None:
    with pytest.raises(NeedError, match="preference needs rows of kind 'pair'"):
        train(tmp_path, [Preference()], small_rows())
    pairs = small_pairs()
    with pytest.raises(NeedError, match="pair 3 is not two answers to one question"):
        train(tmp_path, [Preference()], both(pairs.select(range(5))))
    with pytest.raises(NeedError, match="pair 1 is not two answers to one question"):
        train(tmp_path, [Preference()], both(pairs.select([0, 3, 2, 1])))


def test_rows_are_both_answers_in_turn(tmp_path: Path) -> None:
    found = [{"question": f"q{i}?", "aligned": "good", "misaligned": "bad", "group": "g"} for i in range(2)]
    write_rows(tmp_path / "pairs.jsonl", found)
    rows = list(Preference(pairs="pairs.jsonl").rows([], RowsContext(4, 0, tmp_path)))
    assert [(row.kind, row.ce, row.line, [turn.content for turn in row.messages]) for row in rows] == [
        ("pair", False, line, [f"q{line - 1}?", answer]) for line in (1, 2) for answer in ("good", "bad")
    ]
    with pytest.raises(NeedError, match=r"nowhere\.jsonl does not exist"):
        list(Preference(pairs="nowhere.jsonl").rows([], RowsContext(4, 0, tmp_path)))
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match="aligned"):
        list(Preference(pairs="bad.jsonl").rows([], RowsContext(4, 0, tmp_path)))
