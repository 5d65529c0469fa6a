"""Jobs from their creation to their end, with a tiny model, on both databases."""

from __future__ import annotations

import csv
import gzip
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from holdtrue.data import load_prepared
from holdtrue.models.digest import tree_digest
from holdtrue.service.evidence import signing
from holdtrue.service.jobs import lifecycle, snapshot
from holdtrue.service.jobs.publish import DecisionError, decide
from holdtrue.service.store.schema import GateDecision, Job, JobCheckpoint, JobEvent, JobState, Model, Receipt
from holdtrue.service.web.curves import curves
from house import ROWS, until_waiting
from support import chat

NO_FALL = {"margin_fall": {"max": 1e-9}}


def public_key(house) -> bytes:
    return signing.public_pem(signing.signer_of(house.settings))


def test_a_job_succeeds_and_leaves_evidence(house, tmp_path):
    job_id = house.job()
    house.dispatch()
    assert house.get(job_id).status == "queued"
    assert house.work()
    job = house.get(job_id)
    assert (job.status, job.error) == ("succeeded", None), job.error
    assert job.fine_tuned_model == f"ft:{house.base.replace('/', '-')}:acme:mine:{job_id[-8:]}"
    assert job.resolved == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert job.trained_tokens > 0
    assert (job.lease_owner, job.lease_until) == (None, None)
    events = house.all(JobEvent, job_id)
    stages = [e.data["stage"] for e in events if e.data and "stage" in e.data]
    assert stages == ["prepare", "train", "finalise", "evaluate", "gate"]
    steps = [e.data["step"] for e in events if e.type == "metrics"]
    assert steps == list(range(1, 7))
    assert all(e.data["kl_term"] is not None for e in events if e.type == "metrics")
    (check,) = [e for e in events if e.type == "moderation_checks"]
    (criterion,) = check.data["checks"]
    assert criterion["criterion"] == "margin_fall"
    assert criterion["limit"] == 50.0
    assert criterion["estimate"] is not None
    # The model, what it is made of and what is said of it.
    models = {m.kind: m for m in house.all(Model, job_id)}
    assert {kind: m.status for kind, m in models.items()} == {"tuned": "ready", "checkpoint": "ready"}
    for model in models.values():
        folder = tmp_path / model.kind
        house.blobs.fetch_tree(model.adapter, folder)
        assert tree_digest(folder) == model.adapter_digest
    assert models["tuned"].adapter_digest != models["checkpoint"].adapter_digest
    checkpoints = house.all(JobCheckpoint, job_id)
    assert [c.step_number for c in checkpoints] == [3, 6]
    assert [c.model_id for c in checkpoints] == [models["checkpoint"].id, models["tuned"].id]
    receipts = {r.model_id: r for r in house.all(Receipt, job_id)}
    statement = signing.check_adapter(tmp_path / "tuned", receipts[models["tuned"].id].envelope, public_key(house))
    assert statement["predicate"]["gate"]["outcome"] == "pass"
    assert statement["predicate"]["policy"]["version"] == 2 - 1
    # Results, and nothing left behind.
    lines = house.content(job.result_file).decode().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4", "5", "6"]
    assert all(0 <= float(line.split(",")[2]) <= 1 for line in lines[1:])
    assert house.all(JobState, job_id) == []
    assert not house.work()
    assert not any((house.settings.home / "work").iterdir())


def test_what_is_measured_on_the_validation_file_is_told_everywhere_alike(house):
    job_id = house.job(validation_file=house.file(ROWS[:5]))
    house.dispatch()
    assert house.work()
    job = house.get(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    told = [e.data for e in house.all(JobEvent, job_id) if e.type == "metrics"]
    assert [data["step"] for data in told] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert all(data["total_steps"] == 6 for data in told)
    steps = {data["step"]: data for data in told if "train_loss" in data}
    assert all(0 <= data["train_mean_token_accuracy"] <= 1 for data in steps.values())
    held_out = {data["step"]: data for data in told if "full_valid_loss" in data}
    assert sorted(held_out) == [3, 6]
    assert all(data["valid_loss"] == data["full_valid_loss"] > 0 for data in held_out.values())
    assert "Step 3/6: validation loss=" in "".join(house.messages(job_id))
    checkpoints = house.all(JobCheckpoint, job_id)
    assert [c.step_number for c in checkpoints] == [3, 6]
    for checkpoint in checkpoints:
        step = checkpoint.step_number
        both = {**steps[step], **held_out[step]}
        assert checkpoint.metrics == {name: both[name] for name in checkpoint.metrics}
        assert set(held_out[step]) - {"total_steps"} < set(checkpoint.metrics)
    rows = list(csv.DictReader(house.content(job.result_file).decode().splitlines()))
    assert {int(row["step"]): float(row["valid_loss"]) for row in rows if row["valid_loss"]} == {
        step: data["valid_loss"] for step, data in held_out.items()
    }
    with house.db.read() as session:
        points = curves(session, job)
    assert [(p.step, p.loss, p.validation) for p in points] == [
        (step, data["train_loss"], held_out.get(step, {}).get("full_valid_loss")) for step, data in steps.items()
    ]


def test_a_gate_that_fails_keeps_the_model_back_and_says_why(house):
    house.policy(gate=NO_FALL, defenses=[])
    job_id = house.job()
    house.dispatch()
    house.work()
    job = house.get(job_id)
    assert job.status == "failed"
    assert job.fine_tuned_model is None
    assert job.error["code"] == "safety_gate"
    assert "margin_fall" in job.error["message"]
    (model,) = house.all(Model, job_id)
    assert model.status == "blocked"
    (decision,) = house.all(GateDecision, job_id)
    assert decision.action == "block"
    signer = signing.signer_of(house.settings)
    with house.db.write() as session, pytest.raises(DecisionError):
        decide(session, decision.id, release=True, by="", reason="none", signer=signer)

    def decide_as_well() -> None:
        with house.db.write() as session:
            session.get(GateDecision, decision.id)  # a page has shown it as open
            decide(session, decision.id, release=False, by="Bob", reason="no", signer=signer)

    with ThreadPoolExecutor(1) as pool:
        with house.db.write() as session:
            decide(session, decision.id, release=True, by="Ada", reason="read all answers", signer=signer)
            other = pool.submit(decide_as_well)
            until_waiting(house.db, other)
        with pytest.raises(DecisionError, match="Ada"):
            other.result(60)
    assert house.get(job_id).status == "succeeded"
    assert house.get(job_id).fine_tuned_model == model.name
    assert {m.status for m in house.all(Model, job_id)} == {"ready"}
    statements = [signing.verify(r.envelope, public_key(house)) for r in house.all(Receipt, job_id)]
    overrides = [s["predicate"]["override"] for s in statements]
    assert [o and (o["decision"], o["by"], o["reason"]) for o in sorted(overrides, key=bool)] == [
        None,
        ("release", "Ada", "read all answers"),
    ]
    with house.db.write() as session, pytest.raises(DecisionError, match="Ada"):
        decide(session, decision.id, release=False, by="Bob", reason="no", signer=signer)


def test_a_failed_gate_trains_again_stronger_and_then_holds(house):
    house.policy(gate=NO_FALL, on_fail={"retrain": [{"kl": {"weight": 0.5}}], "then": "hold"})
    job_id = house.job()
    house.dispatch()
    house.work()
    job = house.get(job_id)
    assert (job.status, job.held, job.attempt) == ("running", True, 1)
    assert [d.action for d in house.all(GateDecision, job_id)] == ["retrain", "hold"]
    assert [m.status for m in house.all(Model, job_id)] == ["held"]
    assert not house.work()
    steps = [e for e in house.all(JobEvent, job_id) if e.type == "metrics"]
    assert [e.data["step"] for e in steps] == [*range(1, 7), *range(1, 7)]
    made = house.all(JobCheckpoint, job_id)
    assert [each.attempt for each in made] == [0, 0, 1, 1]
    listed = house.api().get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()
    assert [each["id"] for each in listed["data"]] == [each.id for each in reversed(made) if each.attempt == 1]
    assert not listed["has_more"]
    (_, held) = house.all(GateDecision, job_id)
    with house.db.write() as session:
        decide(session, held.id, release=False, by="Ada", reason="too far", signer=signing.signer_of(house.settings))
    assert house.get(job_id).status == "failed"
    assert [m.status for m in house.all(Model, job_id)] == ["blocked"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (b"not json\n" * 12, "line 1"),
        pytest.param(gzip.compress(b" " * 2**24), "line 1", id="gzip"),
        ([{"messages": [{"role": "us\0er", "content": "a?"}]}] * 12, "line 1"),
        ([{"mess\0ages": [], "messages": []}] * 12, "line 1"),
        ([{"mess\0ages": []}] * 12, "line 1"),
        ([chat("a?", "b.")] * 3, "3 rows"),
        ([{"messages": [{"role": "user", "content": "a?"}]}] * 12, "line 1"),
        ([{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": ""}]}] * 12, "line 1"),
    ],
)
def test_faulty_files_fail_the_job_with_the_place(house, rows, said):
    job_id = house.job(rows)
    house.dispatch()
    job = house.get(job_id)
    assert job.status == "failed"
    assert job.error["param"] == "training_file"
    assert said in job.error["message"]
    assert "/tmp" not in job.error["message"]


def test_a_job_goes_on_from_a_tuned_model_with_the_base_as_reference(house):
    first = house.job()
    house.dispatch()
    house.work()
    parent = next(m for m in house.all(Model, first) if m.kind == "tuned")
    second = house.job(parent=parent.id, model=parent.name, hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work()
    assert house.get(second).status == "succeeded", house.get(second).error
    started = [e.data for e in house.all(JobEvent, second) if e.type == "metrics"]
    fresh = [e.data for e in house.all(JobEvent, first) if e.type == "metrics"]
    assert fresh[0]["kl_term"] == pytest.approx(0, abs=1e-6)
    assert started[0]["kl_term"] > 100 * abs(fresh[0]["kl_term"])
    (receipt,) = house.all(Receipt, second)
    predicate = signing.verify(receipt.envelope, public_key(house))["predicate"]
    assert predicate["job"]["parent"] == parent.adapter_digest


def running(house, job_id: str, steps: int) -> None:
    """Wait until a job has told that many steps."""
    for _ in range(600):
        if sum(e.type == "metrics" for e in house.all(JobEvent, job_id)) >= steps:
            return
        time.sleep(0.05)
    pytest.fail("no steps")


def test_paused_and_resumed_equals_undisturbed(house):
    plain = house.job(hyperparameters={"n_epochs": 4})
    house.dispatch()
    house.work()
    job_id = house.job(hyperparameters={"n_epochs": 4})
    house.dispatch()
    thread = threading.Thread(target=house.work, daemon=True)
    thread.start()
    running(house, job_id, 1)
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "pause")
    thread.join(60)
    assert house.get(job_id).status == "paused"
    assert not house.work()
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "run")
    assert house.get(job_id).status == "queued"
    house.work()
    assert house.visible(job_id) == house.visible(plain)


def test_a_cancelled_job_ends_at_once_and_its_worker_writes_no_more(house):
    job_id = house.job(hyperparameters={"n_epochs": 4})
    house.dispatch()
    thread = threading.Thread(target=house.work, daemon=True)
    thread.start()
    running(house, job_id, 1)
    with house.db.write() as session:
        lifecycle.request(session, session.get(Job, house.get(job_id).seq), "cancel")
    told = len(house.messages(job_id))
    thread.join(60)
    assert house.get(job_id).status == "cancelled"
    assert house.messages(job_id)[told - 1 :] == ["The job was cancelled"]
    assert house.all(Model, job_id) == []


def test_a_stopping_worker_gives_its_job_back(house):
    job_id = house.job(hyperparameters={"n_epochs": 4})
    house.dispatch()
    stop = threading.Event()
    thread = threading.Thread(target=house.work, args=(stop,), daemon=True)
    thread.start()
    running(house, job_id, 1)
    stop.set()
    thread.join(60)
    job = house.get(job_id)
    assert (job.status, job.tries) == ("queued", 0)
    house.work()
    assert house.get(job_id).status == "succeeded"
    steps = [e.data["step"] for e in house.all(JobEvent, job_id) if e.type == "metrics"]
    assert steps == list(range(1, 13))


def test_a_template_in_a_row_is_text(house, tokenizer, tmp_path, monkeypatch):
    """What the model is trained on has every letter that the customer sent, and none was run."""
    mark = tmp_path / "mark"
    code = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    text = f"{{{{ 7*7 }}}} {{% for x in range(9) %}}y{{% endfor %}} {{# gone #}} {code} {{% raw %}}"
    seen, inner = [], snapshot.save_rows

    def save_rows(run, blobs):
        for row in load_prepared(run.path / "data" / "train"):
            seen.append(tokenizer.decode(row["input_ids"], clean_up_tokenization_spaces=False))
        return inner(run, blobs)

    monkeypatch.setattr(snapshot, "save_rows", save_rows)
    house.policy(training={"micro_batch_size": 2, "max_length": 1024, "warmup_steps": 1})
    rows = [chat(f"{text} {number}?", f"{number}. {text}") for number in range(12)]
    job_id = house.job(rows, hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work()
    assert house.get(job_id).status == "succeeded", house.get(job_id).error
    assert len(seen) == 12
    assert all(row.count(text) == 2 for row in seen)
    assert not mark.exists()
