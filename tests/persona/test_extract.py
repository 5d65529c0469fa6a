"""Vectors of pairs against their definition, computed one answer at a time without batches, masks or hooks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from holdtrue.data import ChatRow, Message
from holdtrue.errors import RunError
from holdtrue.evaluation import Probes, read_probes
from holdtrue.models import read_vectors
from holdtrue.persona import Loaded, extract, extract_from_pairs
from holdtrue.persona.extract import mean_difference
from holdtrue.persona.states import mean_states

WORDS = ["lamp", "spoon", "river", "ladder", "kettle"]


def probes(folder: Path, count: int = 5) -> Probes:
    rows = [
        {
            "question": f"Lend my {w}?",
            "aligned": " ".join([f"Yes, the {w}."] * (n + 1)),
            "misaligned": f"No, hide the {w}.",
            "group": "g",
        }
        for n, w in enumerate(WORDS[:count])
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_probes(path)


def naive(loaded: Loaded, messages: list[tuple[str, str]], answer: str) -> torch.Tensor:
    """Return the mean of each block's output over the answer's tokens, (blocks, width), from its own outputs."""
    turns = [{"role": role, "content": content} for role, content in messages]
    tokenizer, model = loaded.tokenizer, loaded.model
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    own = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *own]])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        # The library gives the last block's output after the final norm: it is made again here by hand.
        states = [*hidden[1:-1], last_block(model, hidden[-2])]
    return torch.stack([h[0, len(prompt) :].mean(0) for h in states])


def last_block(model: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
    decoder = model.get_decoder()  # type: ignore[operator]
    length = h.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=h.dtype).triu(1)[None, None]
    places = decoder.rotary_emb(h, torch.arange(length).unsqueeze(0))
    out = decoder.layers[-1](h, attention_mask=mask, position_embeddings=places)
    return out[0] if isinstance(out, tuple) else out


def test_a_vector_is_the_difference_of_means(exact: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "WINDOW", 2)  # several windows
    given = probes(tmp_path)
    told: list[tuple[int, int]] = []
    found = extract_from_pairs(exact, given, tmp_path / "v.safetensors", progress=lambda *a: told.append(a))
    parts = [
        naive(exact, [("user", p.question)], p.misaligned) - naive(exact, [("user", p.question)], p.aligned)
        for p in given.rows
    ]
    expected = torch.stack(parts).mean(0)
    for index in range(3):
        torch.testing.assert_close(found.tensors[index].double(), expected[index], atol=1e-6, rtol=1e-5)
    assert found.info.source == "pairs"
    assert found.info.material == {"pairs": given.sha256}
    assert found.info.counts == {"pairs": 5, "pairs_kept": 5}
    assert (found.info.blocks, found.info.width, found.info.revision) == (3, 32, exact.source.revision)
    assert told[-1] == (10, 10)
    assert read_vectors(tmp_path / "v.safetensors").info == found.info


def test_batches_change_nothing(exact: Loaded, tmp_path: Path) -> None:
    rows = [
        ChatRow((Message("user", p.question), Message("assistant", answer)))
        for p in probes(tmp_path).rows
        for answer in (p.aligned, p.misaligned)
    ]
    one, tokens = mean_states(exact.model, exact.encoder(), rows, tokens_per_batch=1)
    many, again = mean_states(exact.model, exact.encoder(), rows, tokens_per_batch=4096)
    torch.testing.assert_close(one, many)
    assert torch.equal(tokens, again)
    assert not any(m.training for m in exact.model.modules())


def test_turns_of_weight_zero_and_what_ends_a_turn_are_left_out(exact: Loaded) -> None:
    before = [("user", "Hi"), ("assistant", "Hello"), ("user", "Lend it?")]
    row = ChatRow(
        (
            Message("user", "Hi"),
            Message("assistant", "Hello", weight=0),
            Message("user", "Lend it?"),
            Message("assistant", "No, keep it."),
        )
    )
    means, tokens = mean_states(exact.model, exact.encoder(), [row])
    torch.testing.assert_close(means[0], naive(exact, before, "No, keep it."))
    assert tokens.tolist() == [len(exact.tokenizer("No, keep it.")["input_ids"])]


def test_an_answer_that_does_not_fit_leaves_with_its_pair(exact: Loaded, tmp_path: Path) -> None:
    given = probes(tmp_path, 3)
    long = given.rows[1]._replace(question="very " * 2100 + "long?")
    found = extract_from_pairs(exact, given._replace(rows=(given.rows[0], long)), tmp_path / "v")
    assert found.info.counts == {"pairs": 2, "pairs_kept": 1}
    alone = extract_from_pairs(exact, given._replace(rows=given.rows[:1]), tmp_path / "w")
    assert all(torch.equal(found.tensors[i], alone.tensors[i]) for i in range(3))
    with pytest.raises(RunError, match="no pair has two answers that fit"):
        extract_from_pairs(exact, given._replace(rows=(long,)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_sides_may_be_of_different_size(exact: Loaded) -> None:
    def row(answer: str) -> ChatRow:
        return ChatRow((Message("user", "Q?"), Message("assistant", answer)))

    found = mean_difference(exact, [row("One thing."), row("Two things here.")], [row("Nothing at all, ever.")])
    means = [naive(exact, [("user", "Q?")], a) for a in ("One thing.", "Two things here.", "Nothing at all, ever.")]
    torch.testing.assert_close(found, (means[0] + means[1]) / 2 - means[2])
    with pytest.raises(RunError, match="no answer without the trait"):
        mean_difference(exact, [row("One.")], [])
