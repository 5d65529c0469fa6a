"""holdtrue policy and holdtrue verify, as a provider types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select

from holdtrue.cli.main import main
from holdtrue.service import clock, tenancy
from holdtrue.service.evidence import signing
from holdtrue.service.jobs.publish import decide
from holdtrue.service.policy import default_document
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import AuditEntry, GateDecision, Model, Receipt
from house import House, build_house

BASE = "smollm2-135m-instruct"


@pytest.fixture
def home(chosen: Database, tmp_path: Path) -> Path:
    tenancy.bootstrap(chosen)
    return tmp_path


@pytest.fixture
def answer(capfd):
    """Returns a function that runs a command with --json and returns exit code and document."""

    def run(*arguments: object) -> tuple[int, dict]:
        capfd.readouterr()
        code = main([*map(str, arguments), "--json"])
        return code, json.loads(capfd.readouterr().out)

    return run


def test_the_default_policy_is_valid_and_can_be_carried_out(home, tmp_path, answer):
    file = tmp_path / "policy.yaml"
    file.write_text(default_document(BASE))
    code, found = answer("policy", "validate", file)
    assert code == 0
    assert [next(iter(each)) for each in found["document"]["defenses"]] == ["interleave", "kl"]
    assert main(["policy", "validate", str(file)]) == 0


def test_a_policy_is_put_in_force_compared_and_taken_back(home, tmp_path, answer):
    file = tmp_path / "policy.yaml"
    file.write_text(default_document(BASE).replace("weight: 3.0", "weight: 5.0"))
    code, found = answer("policy", "activate", file, "--home", home, "--note", "stronger")
    assert (code, found["version"], found["before"]) == (0, 2, 1)
    code, found = answer("policy", "diff", 1, "--home", home)
    assert any("weight" in line and "3.0" in line and "5.0" in line for line in found["values"])
    code, found = answer("policy", "activate", "--version", 1, "--home", home)
    assert (code, found["version"], found["before"]) == (0, 1, 2)
    assert main(["policy", "history", "--home", str(home)]) == 0
    db = Database(ServiceSettings(home=home).database)
    with db.read() as session:
        told = session.scalars(select(AuditEntry).where(AuditEntry.action == "policy.activate")).all()
        assert [(entry.detail["version"], entry.detail.get("before")) for entry in told] == [(1, None), (2, 1), (1, 2)]
    db.close()


def test_a_faulty_policy_changes_nothing(home, tmp_path, answer):
    file = tmp_path / "policy.yaml"
    file.write_text(default_document(BASE).replace("margin_fall: {max: 0.1}", "margin_fell: {max: 0.1}"))
    code, found = answer("policy", "activate", file, "--home", home)
    assert code == 2
    assert "margin_fell" in json.dumps(found)
    assert answer("policy", "activate", "--home", home)[0] == 2
    assert answer("policy", "diff", 1, 7, "--home", home)[0] == 2


def test_a_model_is_verified_by_name_and_as_a_folder(tmp_path, tiny_dir, answer):
    db = Database(f"sqlite:///{tmp_path / 'service.db'}")
    migrations.upgrade(db)
    house = build_house(db, tmp_path, tiny_dir)
    job_id = house.job(hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work()
    (model,) = house.all(Model, job_id)
    (receipt,) = house.all(Receipt, job_id)
    where = ("--home", house.settings.home, "--database-url", house.settings.database_url)
    code, found = answer("verify", model.name, *where)
    assert (code, found["status"]) == (0, "ready")
    assert main(["verify", model.name, *map(str, where)]) == 0
    house.blobs.fetch_tree(model.adapter, tmp_path / "adapter")
    (tmp_path / "receipt.json").write_text(json.dumps({"envelope": receipt.envelope}))
    signer = signing.signer_of(house.settings)
    (tmp_path / "key.pub").write_bytes(signing.public_pem(signer))
    beside = ("--receipt", tmp_path / "receipt.json", "--key", tmp_path / "key.pub")
    assert answer("verify", tmp_path / "adapter", *beside)[0] == 0
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, found = answer("verify", tmp_path / "adapter", *beside)
    assert code == 1
    assert "not what was signed" in json.dumps(found)
    db.close()


@pytest.mark.parametrize("back", [0, 5])
def test_the_receipt_of_a_persons_decision_is_the_newest(house: House, answer, monkeypatch, back: int):
    """Also within one second of the gate's, or after the clock was set back."""
    house.policy(gate={"margin_fall": {"max": 1e-9}}, defenses=[], on_fail={"then": "hold"})
    job_id = house.job(hyperparameters={"n_epochs": 1})
    house.dispatch()
    house.work()
    (model,), (decision,), (gates,) = (house.all(kind, job_id) for kind in (Model, GateDecision, Receipt))
    assert model.status == "held"
    with monkeypatch.context() as patch:
        patch.setattr(clock, "now", lambda: gates.created_at - back)
        with house.db.write() as session:
            signer = signing.signer_of(house.settings)
            decide(session, decision.id, release=True, by="Ada", reason="read them", signer=signer)
    url = house.db.engine.url.render_as_string(hide_password=False).replace("+psycopg", "")
    code, found = answer("verify", model.name, "--home", house.settings.home, "--database-url", url)
    assert (code, found["status"]) == (0, "ready")
    assert found["predicate"]["override"]["by"] == "Ada"
    shown = house.api().get(f"/v1/holdtrue/jobs/{job_id}/receipt").json()
    assert signing.payload(shown["envelope"]) == {key: value for key, value in found.items() if key != "status"}
