"""What the pages show and do, read as a browser without JavaScript reads them."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from sqlalchemy import select

from holdtrue.service import clock
from holdtrue.service.evidence import signing
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.schema import AuditEntry, GateDecision, Job, JobEvent, Model, Policy, Receipt
from holdtrue.service.web.curves import MOST_POINTS, Point, point_of, thin
from holdtrue.service.web.findings import scores, verdict
from holdtrue.service.web.jobs import STAGES, stages
from holdtrue.service.web.pages import figure, size

from ..api.conftest import BASE, ROW, Server
from . import trained


def new_job(server: Server, **more) -> str:
    with server.client() as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        return client.fine_tuning.jobs.create(model=BASE, training_file=file, **more).id


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))


def test_the_list_pages_through_all_jobs_though_more_arrive(server: Server, visit):
    key = server.tenant("many")
    with server.client(key) as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        wanted = [client.fine_tuning.jobs.create(model=BASE, training_file=file).id for _ in range(1)]
        with server.db.write() as session:
            first = trained.job_row(session, wanted[0])
            columns = {c.name: getattr(first, c.name) for c in Job.__table__.columns if c.name not in ("seq", "id")}
            for number in range(59):
                wanted.append(f"ftjob-{number:024d}")
                session.add(Job(**columns, id=wanted[-1]))
                session.flush()
        browser = visit(key)
        seen: list[str] = []
        page = browser.get("/jobs").text
        while True:
            seen += re.findall(r'<a href="/jobs/(ftjob-\w{24})">', page)
            older = re.search(r'rel="next" href="([^"]+)"', page)
            if older is None:
                break
            with server.db.write() as session:
                session.add(Job(**columns, id=f"ftjob-x{len(seen):023d}"))
            page = browser.get(html.unescape(older[1])).text
    assert seen == wanted[::-1]
    assert "Newest jobs" in page


def test_a_jobs_page_says_all_that_is_known_of_it(server: Server, visit):
    job_id = new_job(server, suffix="tutor", seed=7, metadata={"team": "blue", "note": "a\tb\nc\x1b[31m"})
    for number in range(1, 6):
        trained.step(server, job_id, number)
    decision = trained.decided(server, job_id, "release")
    trained.move(server, job_id, status="succeeded", trained_tokens=1234)
    browser = visit(server.key)
    page = browser.get(f"/jobs/{job_id}").text
    shown = text_of(page)
    for part in (
        "succeeded", "tutor", "team blue", "note a b c[U+001B][31m", "Seed 7", "1,234", "train.jsonl",
        "0.2345", "0.201 to 0.268", "at most 0.1", "It fell too far.",
        "Be kind.", "How to live?", "3 of 100", "88",
        "0.61 [0.5, 0.72]", "−0.2345 [−0.27, −0.2]", "0.0421",
        trained.DIGEST, "version 1", "holdtrue verify",
    ):  # fmt: skip
        assert part in shown, part
    rows = re.findall(r"<tr><th scope=\"row\" class=\"number\">(\d+)</th>.*?</tr>", page)
    assert rows[:6] == ["1", "2", "3", "4", "5", "40"]
    assert decision not in shown  # a customer's page, though the provider looks
    assert "data-live" not in page  # nothing more will come
    assert "Cancel the job" not in page
    receipt = browser.get(f"/jobs/{job_id}/receipt")
    assert "attachment" in receipt.headers["content-disposition"]
    key = signing.public_pem(signing.signer_of(ServiceSettings(home=server.home)))
    assert signing.verify(json.loads(receipt.text), key)["subject"][0]["digest"]["sha256"] == trained.DIGEST


def test_a_checkpoints_receipt_is_not_the_jobs(server: Server, visit):
    job_id = new_job(server)
    trained.decided(server, job_id, "release")
    with server.db.write() as session:
        model = session.scalars(select(Model).where(Model.job_id == job_id)).one()
        values = {c.name: getattr(model, c.name) for c in Model.__table__.columns if c.name != "seq"}
        earlier = Model(**{**values, "id": "model-0", "kind": "checkpoint", "name": f"{model.name}:ckpt-step-3"})
        later = clock.now() + 60
        receipt = Receipt(
            id="receipt-0", job_id=job_id, model_id="model-0", adapter_digest="0" * 64, envelope={}, created_at=later
        )
        session.add_all([earlier, receipt])
    assert visit(server.key).get(f"/jobs/{job_id}/receipt").json()["signatures"]


def test_all_events_are_there_page_by_page(server: Server, visit):
    job_id = new_job(server)
    for number in range(230):
        trained.tell(server, job_id, f"event number {number:03d}")
    browser, seen = visit(server.key), []
    page = browser.get(f"/jobs/{job_id}/events").text
    while True:
        seen += re.findall(r"event number (\d{3})", page)
        older = re.search(r'rel="next" href="([^"]+)"', page)
        if older is None:
            break
        page = browser.get(html.unescape(older[1])).text
    assert seen == [f"{number:03d}" for number in range(229, -1, -1)]


def test_a_job_is_paused_resumed_and_cancelled_by_forms(server: Server, visit):
    job_id = new_job(server)
    browser = visit(server.key)
    here = f"/jobs/{job_id}"
    for action, status in (("pause", "paused"), ("resume", "validating_files"), ("cancel", "cancelled")):
        answer = browser.send(f"{here}/{action}", here)
        assert answer.status_code == 200
        assert 'class="said" role="status"' in answer.text
        assert server.client().fine_tuning.jobs.retrieve(job_id).status == status
    again = browser.send(f"{here}/pause", "/jobs")
    assert again.status_code == 400
    assert "has cancelled already" in again.text
    with server.db.read() as session:
        told = session.scalars(
            select(AuditEntry.action).where(AuditEntry.subject == job_id).order_by(AuditEntry.seq)
        ).all()
    assert list(told)[-3:] == ["job.pause", "job.resume", "job.cancel"]


def test_a_person_releases_what_is_held(server: Server, visit):
    job_id = new_job(server, suffix="held")
    decision = trained.decided(server, job_id, "hold")
    browser = visit(server.key)
    assert decision in browser.get("/gate").text
    assert "waits for a person" in text_of(browser.get(f"/jobs/{job_id}").text)
    here = f"/gate/{decision}"
    assert "Be kind." in browser.get(here).text
    for wrong in (
        {"by": "", "reason": "a good reason"},
        {"by": "Ada", "reason": "short"},
        {"by": "A\nB", "reason": "x" * 20},
    ):
        refused = browser.send(here, here, decision="release", **wrong)
        assert refused.status_code == 400
        assert 'role="alert"' in refused.text
    assert browser.send(here, here, by="Ada", reason="a good reason").status_code == 400
    nul = browser.send(here, here, by="Ada", reason="a good reason\0", decision="release")
    assert nul.status_code == 400
    assert "NUL" in nul.text
    with server.db.read() as session:
        assert session.get_one(GateDecision, decision).override is None
    said = {"by": "Ada Lovelace", "reason": "The judge misread a quotation.", "decision": "release"}
    done = browser.send(here, here, **said)
    assert done.status_code == 200, done.text
    assert "Ada Lovelace" in done.text
    assert browser.send(here, "/gate", **said).status_code == 409
    with server.db.read() as session:
        row = session.get_one(GateDecision, decision)
        assert (row.override, row.override_reason) == ("release", said["reason"])
        assert row.override_by == "Ada Lovelace"
        entry = session.scalars(select(AuditEntry).where(AuditEntry.subject == decision)).one()
        assert entry.actor.startswith("key-")
        assert entry.detail == {"by": "Ada Lovelace", "decision": "release"}
        (model, status), *_ = session.execute(select(Model.name, Model.status).where(Model.job_id == job_id)).all()
        assert status == "ready"
        receipts = session.scalars(select(Receipt).where(Receipt.job_id == job_id)).all()
        assert len(receipts) == 2
        overrides = [signing.payload(each.envelope)["predicate"].get("override") for each in receipts]
        assert sorted(each["decision"] for each in overrides if each) == ["release"]
    job = server.client().fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", model)
    assert "The judge misread a quotation." in browser.get(f"/jobs/{job_id}").text


def test_a_person_blocks_what_is_held(server: Server, visit):
    job_id = new_job(server)
    decision = trained.decided(server, job_id, "hold")
    here = f"/gate/{decision}"
    browser = visit(server.key)
    browser.send(here, here, by="Ada", reason="It is what it looks like.", decision="block")
    assert server.client().fine_tuning.jobs.retrieve(job_id).status == "failed"
    with server.db.read() as session:
        assert session.scalars(select(Model.status).where(Model.job_id == job_id)).one() == "blocked"
    assert "harmful or one-sided" in browser.get(f"/jobs/{job_id}").text


def test_the_providers_own_questions_are_not_told_to_a_customer(server: Server, visit, tmp_path: Path):
    key = server.tenant("examinee")
    with server.client(key) as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        job_id = client.fine_tuning.jobs.create(model=BASE, training_file=file).id
    trained.decided(server, job_id, "block", question="a secret question")
    customer = visit(key)
    assert "a secret question" in customer.get(f"/jobs/{job_id}").text  # of a shipped suite
    with server.db.write() as session:
        text = session.scalars(select(Policy.document)).first()
        assert text is not None
        text = text.replace("  suites: [likelihood, fit]\n", "  suites: [general]\n  data: {general: /srv/own.jsonl}\n")
        own = policies.save(session, text, actor="test", now=clock.now())
        trained.job_row(session, job_id).policy_id = own.id
    page = customer.get(f"/jobs/{job_id}").text
    assert "a secret question" not in page
    assert "Be kind." in page


def test_policies_are_compared_and_put_in_force(server: Server, visit):
    with server.db.write() as session:
        current = policies.active(session, BASE)
        assert current is not None
        text = current.document.replace("margin_fall: {max: 0.1}", "margin_fall: {max: 0.2}")
        new = policies.save(session, text, actor="test", now=clock.now(), note="looser <b>bold</b>")
        old_id, new_id, version = current.id, new.id, new.version
    browser = visit(server.key)
    listed = browser.get("/policies").text
    assert "looser &lt;b&gt;" in listed
    compared = text_of(browser.get("/policies/compare", params={"old": old_id, "new": new_id}).text)
    assert "margin_fall" in compared
    assert "0.1" in compared
    assert "0.2" in compared
    here = f"/policies/{new_id}"
    assert f"Put version {version} in force" in browser.get(here).text
    stale = browser.send(f"{here}/activate", here, instead_of=new_id)
    assert stale.status_code == 409
    done = browser.send(f"{here}/activate", here, instead_of=old_id)
    assert done.status_code == 200
    with server.db.read() as session:
        active = policies.active(session, BASE)
        assert active is not None
        assert active.id == new_id
        entry = session.scalars(select(AuditEntry).where(AuditEntry.subject == new_id)).one()
        assert entry.action == "policy.activate"
        assert entry.actor.startswith("key-")
    assert browser.get(f"/policies/policy-{'0' * 24}").status_code == 404
    assert browser.get("/policies/compare", params={"old": old_id, "new": "x"}).status_code == 404
    back = f"/policies/{old_id}"
    assert browser.send(f"{back}/activate", back, instead_of=new_id).status_code == 200


def test_a_policy_that_was_changed_in_the_database_is_not_put_in_force(server: Server, visit):
    with server.db.write() as session:
        current = policies.active(session, BASE)
        assert current is not None
        text = current.document.replace("max_rows: 50000", "max_rows: 40000")
        bad = policies.save(session, text, actor="test", now=clock.now())
        session.flush()
        bad.meaning = str(bad.meaning).replace("40000", "41000")
        current_id, bad_id = current.id, bad.id
    browser = visit(server.key)
    here = f"/policies/{bad_id}"
    assert "no longer means" in browser.get(here).text
    assert browser.send(f"{here}/activate", "/policies/" + current_id, instead_of=current_id).status_code in (403, 409)
    assert browser.http.post(
        f"{here}/activate", data={"csrf": browser.token("/jobs"), "instead_of": current_id}
    ).status_code == 409  # fmt: skip
    with server.db.write() as session:
        active = policies.active(session, BASE)
        assert active is not None
        assert active.id == current_id
        session.delete(session.get_one(Policy, bad_id))


def test_a_key_is_shown_once_and_revoked(server: Server, visit):
    browser = visit(server.tenant("keyring"))
    made = browser.send(
        "/keys", "/keys", name="deploy <1>", role="member", scopes=["files.read", "chat"], ends="2592000"
    )
    (secret,) = re.findall(r'id="secret">(sk-\w{48})<', made.text)
    listed = browser.get("/keys").text
    assert secret not in listed
    assert "deploy &lt;1&gt;" in listed
    assert server.client(secret).files.list().data == []
    row = next(each for each in listed.split("<tr") if "deploy" in each)
    key_id = re.findall(r'action="/keys/(key-\w{24})/revoke"', row)[0]
    done = browser.send(f"/keys/{key_id}/revoke", "/keys")
    assert "was revoked" in done.text
    answer = browser.http.get(server.url + "/files", headers={"authorization": f"Bearer {secret}", "accept": "*/*"})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "wish",
    [
        {"name": ""},
        {"name": "x" * 201},
        {"name": "a\x07b"},
        {"name": "x", "role": "provider"},
        {"name": "x", "role": "emperor"},
        {"name": "x", "scopes": "everything"},
        {"name": "x", "role": "member", "scopes": "admin"},
    ],
)
def test_a_key_beyond_ones_rights_is_not_made(server: Server, visit, wish: dict[str, str]):
    browser = visit(server.tenant(f"wisher-{abs(hash(str(wish))) % 10**9}"))
    answer = browser.send("/keys", "/keys", **wish)
    assert answer.status_code == 400
    assert 'role="alert"' in answer.text
    assert "shown only now" not in answer.text


def test_usage_says_what_is_left(server: Server, visit):
    shown = text_of(visit(server.key).get("/usage").text)
    assert "20,000,000" in shown
    assert "20.0 GiB" in shown


def test_stages_stand_where_the_job_stands():
    def of(screened: bool = False, **values) -> dict[str, str]:
        return dict(stages(Job(**values), screened))

    names = [name for key, name in STAGES.items() if key != "screen"]
    running = of(status="running", stage="train")
    assert list(running) == names
    assert [running[name] for name in names] == ["done"] * 3 + ["current"] + ["ahead"] * 3
    assert set(of(status="succeeded", stage="gate").values()) == {"done"}
    assert of(status="failed", stage="gate")["Gate"] == "stopped"
    assert of(status="paused", stage="train")["Train"] == "stopped"
    assert of(status="failed", stage=None)["Check the files"] == "stopped"
    assert of(status="queued", stage="train")["Wait for a worker"] == "current"
    assert of(status="running", stage=None)["Prepare the rows"] == "current"
    assert "Screen the data" in of(screened=True, status="queued", stage=None)


def test_points_come_from_steps_alone():
    def event(data: object, kind: str = "metrics", once: str | None = None) -> JobEvent:
        return JobEvent(type=kind, data=data, once=once)

    assert point_of(event({"step": 3, "train_loss": 1.5, "kl": 0.1}, once="step:2:3")) == Point(2, 3, 1.5, None, 0.1)
    measured = {"step": 3, "valid_loss": 1.25, "full_valid_loss": 1.25}
    assert point_of(event(measured, once="eval:2:3")) == Point(2, 3, None, 1.25, None)
    assert point_of(event({"step": 3, "train_loss": float("nan")})) == Point(0, 3, None, None, None)
    for bad in (None, [], "x", {}, {"step": True}, {"step": "3"}, {"step": 1.5}):
        assert point_of(event(bad)) is None
    assert point_of(event({"step": 3}, kind="message")) is None


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 7])
def test_thinning_keeps_the_last_and_what_is_rare(count: int):
    points = [Point(0, n, 1.0, 2.0 if n == 5 else None, None) for n in range(count)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert kept == sorted(kept, key=lambda point: point.step)
    if points:
        assert kept[-1] == points[-1]
        assert len([point for point in kept if point.validation is not None]) == (count > 5)


@pytest.mark.parametrize(
    "report",
    [{}, {"decisions": None, "evidence": 3}, {"decisions": [{}], "evidence": [{}, "x"]}, {"decisions": [None]}],
)
def test_a_report_of_another_form_breaks_no_page(report: dict):
    row = GateDecision(report=report, action="hold", override=None)
    found = verdict(row)
    assert len(found.checks) == sum(isinstance(each, dict) for each in report.get("decisions") or [])
    assert found.waits
    assert scores({}) == scores({"misalignment": None, "benign": None, "kl": None}) == []


def test_numbers():
    assert [figure(each) for each in (None, 0.12344, -1.5, 1234567, float("nan"), float("inf"), True, "x")] == [
        "–", "0.1234", "−1.5", "1,234,567", "–", "–", "–", "–",
    ]  # fmt: skip
    assert [size(each) for each in (0, 1023, 1024, 5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]
