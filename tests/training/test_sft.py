"""The subclass of TRL's SFTTrainer, against the real one."""

from __future__ import annotations

import json

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from holdtrue.errors import NeedError, SpecError  # noqa: E402
from holdtrue.models import AdapterSpec, load_tokenizer, new_adapter, resolve  # noqa: E402
from holdtrue.training import DefendedSFTTrainer  # noqa: E402


def conversations(count: int) -> Dataset:
    words = ["red", "green", "blue", "one", "two", "three", "up", "down"]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Say {words[i % 8]} and {words[i % 5]}."}],
                "completion": [{"role": "assistant", "content": " ".join(words[: 2 + i % 6])}],
            }
            for i in range(count)
        ]
    )


def trainer(kind, tiny_model, tiny_dir, folder, **extra):
    settings = extra.pop("settings", {})
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        max_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        completion_only_loss=True,
        **settings,
    )
    model = new_adapter(tiny_model(), AdapterSpec(r=4, alpha=8), seed=0) if extra.pop("adapt", True) else tiny_model()
    return kind(
        model=model,
        args=arguments,
        train_dataset=conversations(24),
        processing_class=load_tokenizer(resolve(str(tiny_dir))),
        **extra,
    )


def losses(found):
    return [r["loss"] for r in found.state.log_history if "loss" in r]


def test_without_defenses_it_is_the_real_one(tiny_model, tiny_dir, tmp_path):
    real = trainer(trl.SFTTrainer, tiny_model, tiny_dir, tmp_path / "a")
    ours = trainer(DefendedSFTTrainer, tiny_model, tiny_dir, tmp_path / "b")
    real.train()
    ours.train()
    assert losses(ours) == pytest.approx(losses(real), abs=2e-4)
    theirs = dict(real.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=2e-3, rtol=1e-3)


def test_with_defenses_it_holds_the_policy_near(tiny_model, tiny_dir, tmp_path):
    plain = trainer(DefendedSFTTrainer, tiny_model, tiny_dir, tmp_path / "a", kl_every=1)
    held = trainer(
        DefendedSFTTrainer,
        tiny_model,
        tiny_dir,
        tmp_path / "b",
        defenses=[{"kl": {"weight": 30.0}}, {"ldifs": {"weight": 1.0}}],
    )
    plain.train()
    held.train()
    assert plain.evaluate(eval_dataset=plain.train_dataset)["eval_loss"] > 0
    last = [next(r for r in reversed(t.state.log_history) if "kl" in r) for t in (plain, held)]
    assert last[1]["kl"] < 0.5 * last[0]["kl"]
    assert {"kl_term", "kl_weighted", "ldifs_term", "padding", "target_tokens"} <= set(last[1])
    json.dumps(last)


def test_what_it_cannot_do_is_refused(tiny_model, tiny_dir, tmp_path):
    with pytest.raises(SpecError, match="packing=False"):
        trainer(DefendedSFTTrainer, tiny_model, tiny_dir, tmp_path, settings={"packing": True})
    with pytest.raises(SpecError, match="loss_type 'dft' is not supported"):
        trainer(DefendedSFTTrainer, tiny_model, tiny_dir, tmp_path, settings={"loss_type": "dft"})
    for defense in ({"kl": {"on": "pool"}}, "gradient_projection", "preference"):
        with pytest.raises(SpecError, match="TRL's batches do not tell"):
            trainer(DefendedSFTTrainer, tiny_model, tiny_dir, tmp_path, defenses=[defense])
    with pytest.raises(NeedError, match="full fine-tuning"):
        trainer(DefendedSFTTrainer, tiny_model, tiny_dir, tmp_path, adapt=False)
