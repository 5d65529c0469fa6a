"""The reference's passes: behind a shared start, and through the cache, they say what a whole pass says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.models import AdapterSpec, causal_lm, load_model, new_adapter, without_adapter
from holdtrue.training.batch import Batch
from holdtrue.training.reference import SHORTEST_START, Reference, captured_blocks, shared_start
from holdtrue.training.reference_cache import ReferenceCache
from support import small_model

MODEL = small_model()
BLOCKS = (0, 2)


def batch_of(rows: list[list[int]], prompt: int = 3) -> Batch:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :prompt] = -100
    return Batch.of({"input_ids": ids, "labels": labels, "attention_mask": mask})


def whole(batch: Batch, wanted: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    with without_adapter(MODEL), captured_blocks(MODEL, BLOCKS) as outputs:
        hidden = causal_lm(MODEL).get_decoder()(input_ids=batch.input_ids).last_hidden_state
    return hidden[wanted], {i: o * batch.mask.unsqueeze(-1) for i, o in outputs.items()}


def check(reference: Reference, batch: Batch, wanted: torch.Tensor, blocks: bool) -> None:
    found = reference.outputs(batch, wanted, blocks=blocks)
    hidden, outputs = whole(batch, wanted)
    torch.testing.assert_close(found.hidden, hidden, atol=2e-5, rtol=1e-5)
    assert set(found.blocks) == (set(BLOCKS) if blocks else set())
    for index, output in found.blocks.items():
        torch.testing.assert_close(output, outputs[index], atol=2e-5, rtol=1e-5)


def tokens_read(work: Any, model: Any = MODEL) -> int:
    """Return how many tokens the decoder reads while ``work`` runs."""
    read: list[int] = []
    decoder = causal_lm(model).get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        work()
    finally:
        handle.remove()
    return sum(read)


row = st.lists(st.integers(1, 499), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.tuples(st.sampled_from([0, 3, 9, 14]), row), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    known=st.sampled_from([0, 7, 9, 14]),
    everywhere=st.booleans(),
    blocks=st.booleans(),
)
def test_equals_a_whole_pass_whatever_rows_share(batches, known, everywhere, blocks):
    start = list(range(100, 114))
    reference = Reference(MODEL, BLOCKS, start=start[:known])
    for rows in batches:
        batch = batch_of([start[:shared] + rest for shared, rest in rows])
        check(reference, batch, batch.mask if everywhere else batch.response, blocks)


def test_what_a_batch_gives_does_not_depend_on_those_before():
    start = list(range(50, 70))
    first = batch_of([[*start, 80, 81], [*start[:12], 90, 91, 92]])
    batch = batch_of([[*start, 5, 6, 7], [*start, 8], [9, 8, 7, 6]])
    alone = Reference(MODEL, BLOCKS, start=start).outputs(batch, batch.mask, blocks=True)
    reference = Reference(MODEL, BLOCKS, start=start)
    reference.outputs(first, first.response)
    after = reference.outputs(batch, batch.mask, blocks=True)
    assert torch.equal(alone.hidden, after.hidden)
    assert all(torch.equal(alone.blocks[i], after.blocks[i]) for i in BLOCKS)


def test_the_shared_start_is_read_once():
    start = list(range(50, 70))
    reference = Reference(MODEL, start=start)
    batches = [batch_of([[*start, *range(a, a + 5)], [*start, *range(a + 7, a + 10)]]) for a in (80, 120, 160)]

    def work(some: Reference, batch: Batch) -> Any:
        return lambda: some.outputs(batch, batch.mask)

    assert tokens_read(work(reference, batches[0])) == 20 + (10 + 30) + 2 * 5  # the start, the check, what follows
    assert tokens_read(work(reference, batches[1])) == 2 * 5
    mixed = batch_of([[*start, 3, 4], [5, 6, 7], [*start, 8]])
    assert tokens_read(work(reference, mixed)) == 2 * 2 + 22
    short = Reference(MODEL, start=start[: SHORTEST_START - 1])
    assert tokens_read(work(short, batches[2])) == batches[2].mask.numel()


@settings(max_examples=100, deadline=None)
@given(
    start=st.lists(st.integers(0, 3), max_size=6), rests=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1)
)
def test_the_start_that_rows_share(start, rests):
    rows = [start + rest for rest in rests]
    expected = 0
    while all(len(r) > expected + 1 for r in rows) and len({r[expected] for r in rows}) == 1:
        expected += 1
    assert list(shared_start(rows)) == rows[0][:expected]


def test_rows_and_positions_that_nobody_wants_are_not_read():
    reference = Reference(MODEL)
    batch = batch_of([list(range(1, 11)), list(range(20, 40)), list(range(60, 66))])
    wanted = torch.zeros_like(batch.mask)
    wanted[0, 4] = wanted[2, 2] = True
    assert tokens_read(lambda: check(reference, batch, wanted, blocks=False)) == 2 * 5 + batch.mask.numel()
    nothing = torch.zeros_like(batch.mask)
    assert tokens_read(lambda: reference.outputs(batch, nothing)) == 0
    assert reference.outputs(batch, nothing).hidden.shape == (0, 32)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def changed(request: pytest.FixtureRequest) -> Any:
    """A model of its own in float32 or bfloat16, to be given a first token with a norm as real ones have it."""
    model = small_model().to(request.param)
    embeddings = causal_lm(model).get_input_embeddings()
    embeddings.weight.data[START[0]] *= 1000
    return model


START = list(range(50, 70))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_model_that_looks_ahead_is_read_whole(changed: Any, share: float, caplog: pytest.LogCaptureFixture):
    decoder = causal_lm(changed).get_decoder()
    decoder.embed_tokens.register_forward_hook(lambda _, __, out: out + share * out[:, 1:].mean(1, keepdim=True))
    batch = batch_of([[*START, 90, 91, 92], [*START, 95, 96, 97]])
    reference = Reference(changed, BLOCKS, start=START)
    with caplog.at_level("INFO", logger="holdtrue"):
        found = [reference.outputs(batch, batch.mask, blocks=True) for _ in range(2)]
    assert "reads every row whole" in caplog.text
    with without_adapter(changed):
        hidden = decoder(input_ids=batch.input_ids).last_hidden_state
    assert all(torch.equal(each.hidden, hidden[batch.mask]) for each in found)


def test_a_model_that_does_not_is_read_from_behind_the_start(changed: Any, caplog: pytest.LogCaptureFixture):
    batch = batch_of([[*START, 90, 91, 92], [*START, 95, 96, 97]])
    reference = Reference(changed, BLOCKS, start=START)
    with caplog.at_level("INFO", logger="holdtrue"):
        reference.outputs(batch, batch.mask, blocks=True)
        read = tokens_read(lambda: reference.outputs(batch, batch.mask, blocks=True), changed)
    assert not caplog.records
    assert read == 2 * 3


@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_cached_is_not_run_again(tmp_path, blocks):
    batch = batch_of([list(range(1, 11)), list(range(20, 40)), list(range(60, 66))])
    partly = torch.tensor([[True], [False], [True]])
    with ReferenceCache(tmp_path, limit_bytes=10**7, namespace="small") as cache:
        reference = Reference(MODEL, BLOCKS, cache=cache)
        first = tokens_read(lambda: reference.outputs(batch, batch.response & partly, blocks=False))
        assert 0 < first < batch.mask.numel()
        check(reference, batch, batch.response, blocks)
        assert tokens_read(lambda: reference.outputs(batch, batch.response, blocks=blocks)) == 0
        check(Reference(MODEL, BLOCKS, cache=cache), batch, batch.response, blocks)
        elsewhere = tokens_read(lambda: reference.outputs(batch, batch.mask, blocks=blocks))
        assert elsewhere == batch.mask.numel()  # other positions are other entries


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=str)
def test_what_is_cached_says_what_a_pass_among_other_rows_says(tmp_path, smollm2, tokenizer, dtype, limit):
    """For each token, the KL of the live reference from the cached one, in nats."""
    lm = load_model(smollm2, device="cpu", dtype=dtype)
    model = new_adapter(lm, AdapterSpec(r=4, alpha=8), seed=0)
    texts = ["A door that sticks is planed at its edge.", "No.", "The pipe " + "drips and drips " * 12, "Ask."]
    rows = [tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n").input_ids for text in texts]
    with ReferenceCache(tmp_path, limit_bytes=10**8, namespace="smollm2") as cache:
        first = batch_of(rows)
        Reference(model, cache=cache).outputs(first, first.mask)
        other = batch_of([rows[3], rows[0], rows[1]])
        before = cache.stats().hits
        cached = Reference(model, cache=cache).outputs(other, other.mask).hidden
        assert cache.stats().hits == before + 3
    live = Reference(model).outputs(other, other.mask).hidden
    with torch.no_grad():
        p, q = (lm.get_output_embeddings()(hidden).double().log_softmax(-1) for hidden in (live, cached))
    divergence = (p.exp() * (p - q)).sum(-1)
    assert float(divergence.max()) < limit
