from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml

from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation import lm_eval_task
from holdtrue.evaluation.lm_eval_task import run_lm_eval
from holdtrue.scoring import final_hidden, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TinyModel = Callable[[], "PreTrainedModel"]

ROWS = [
    {"question": "The shop opens at", "choices": ["nine o'clock", "the", "a green door that nobody uses"], "label": 0},
    {"question": "Bread is made of", "choices": ["flour", "sand and old newspapers", "it"], "label": 0},
    {"question": "A week has", "choices": ["a", "seven days", "many hours of rain in it"], "label": 1},
    {"question": "To lock the till you", "choices": ["it is", "sing to it every day", "turn the key"], "label": 2},
    {"question": "Snow is", "choices": ["cold", "made of wool by careful hands", "of"], "label": 1},
]


def write_task(folder: Path, name: str = "shop", **changes: Any) -> None:
    data = folder / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 2.0},
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in task.items() if v is not None}))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task files. The harness's own index, which takes long to read, is left out of sight."""
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.setattr(
        lm_eval_task, "_harness_tasks", lambda: TaskManager(include_path=str(folder), include_defaults=False)
    )
    return folder


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, answer: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(f"{context} {answer}")["input_ids"]])
    with torch.no_grad():
        logits = output_head(model)(final_hidden(model, ids))[0]
    picked = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(picked[start - 1 :].sum())


def right_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Per row, whether the likeliest choice per character is the right one."""
    picks = []
    for row in ROWS:
        scores = [log_likelihood(model, tokenizer, row["question"], c) / len(c) for c in row["choices"]]
        picks.append(int(np.argmax(scores)) == row["label"])
    return np.array(picks, dtype=float)


def test_a_task_gives_what_our_own_log_likelihoods_give(
    tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_task(tasks)
    model = tiny_model()
    right = right_answers(model, tokenizer)
    assert 0 < right.mean() < 1
    result = run_lm_eval(model, tokenizer, "shop", include_path=tasks)
    assert result._replace(value=0.0, stderr=None) == ("shop", "acc_norm", 0.0, None, 5, "2.0")
    assert result.value == pytest.approx(right.mean())
    assert result.stderr == pytest.approx(right.std(ddof=1) / 5**0.5)
    first = run_lm_eval(model, tokenizer, "shop", limit=1)
    assert (first.value, first.stderr, first.n) == (right[0], None, 1)


def test_everything_is_left_as_it_was(tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    write_task(tasks, metric_list=[{"metric": "acc"}])
    model = tiny_model().train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    assert run_lm_eval(model, tokenizer, "shop", limit=2, include_path=tasks).metric == "acc"
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)
    assert all(module.training for module in model.modules())


def test_a_group_with_its_own_score(tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    write_task(tasks, "shop_a", tag="shops")
    write_task(tasks, "shop_b", tag="shops")
    group = {
        "group": "both",
        "task": ["shop_a", "shop_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1},
    }
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    del group["aggregate_metric_list"]
    (tasks / "plain.yaml").write_text(yaml.safe_dump({**group, "group": "plain"}))
    model = tiny_model()
    one, both = (run_lm_eval(model, tokenizer, name) for name in ("shop_a", "both"))
    assert (both.task, both.metric, both.n, both.version) == ("both", "acc", 10, "1")
    assert one.n == 5
    with pytest.raises(SpecError, match="no score of its own; name one of its tasks: shop_a, shop_b"):
        run_lm_eval(model, tokenizer, "plain", limit=1)
    with pytest.raises(SpecError, match="label of several tasks; name one of them: shop_a, shop_b"):
        run_lm_eval(model, tokenizer, "shops")


def test_generated_answers_match_exactly(
    tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model()
    ids = torch.tensor([tokenizer("Say")["input_ids"]])
    with torch.no_grad():
        greedy = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=3)[0, ids.shape[1] :])
    write_task(
        tasks,
        output_type="generate_until",
        doc_to_text="Say",
        doc_to_choice=None,
        doc_to_target=greedy,
        metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["<never>"], "do_sample": False, "max_gen_toks": 3},
        filter_list=[{"name": "as-is", "filter": [{"function": "take_first"}]}],
    )
    result = run_lm_eval(model, tokenizer, "shop", limit=2)
    assert (result.metric, result.value, result.n) == ("exact_match,as-is", 1.0, 2)


def test_a_task_of_which_less_is_better_is_refused(
    tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_task(
        tasks,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_choice=None,
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    with pytest.raises(SpecError, match="only word_perplexity,none; choose another"):
        run_lm_eval(tiny_model(), tokenizer, "shop", limit=1)


def test_a_task_that_runs_code_is_refused(
    tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_task(tasks, unsafe_code=True)
    with pytest.raises(SpecError, match="runs code that the model writes"):
        run_lm_eval(tiny_model(), tokenizer, "shop")


def test_bad_requests_say_what_to_do(
    tasks: Path, tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tasks)
    write_task(tasks, "far", dataset_path="nobody-at-all/nothing-here", dataset_kwargs=None)
    write_task(tasks, "broken", dataset_kwargs={"data_files": {"tset": str(tasks / "rows.json")}})
    model = tiny_model()
    with pytest.raises(SpecError, match=r"no task 'shpo'.*'shop'.*lm-eval ls tasks"):
        run_lm_eval(model, tokenizer, "shpo")
    with pytest.raises(SpecError, match="limit must be at least 1"):
        run_lm_eval(model, tokenizer, "shop", limit=0)
    with pytest.raises(SpecError, match="is no folder"):
        run_lm_eval(model, tokenizer, "shop", include_path=tasks / "nowhere")
    with pytest.raises(RunError, match=r"the data of task 'far' could not be had \(.*nobody-at-all.*network"):
        run_lm_eval(model, tokenizer, "far")
    with pytest.raises(RunError, match="task 'broken' cannot be loaded"):
        run_lm_eval(model, tokenizer, "broken")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpecError, match=r"holdtrue\[lm-eval\]"):
        run_lm_eval(model, tokenizer, "shop")


@pytest.mark.slow
def test_the_harness_own_tasks_are_known(tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    with pytest.raises(RunError, match="the data of task 'arc_easy' could not be had"):
        run_lm_eval(model, tokenizer, "arc_easy")
    with pytest.raises(SpecError, match=r"no task 'arc_eesy'.*'arc_easy'"):
        run_lm_eval(model, tokenizer, "arc_eesy")
