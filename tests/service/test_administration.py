"""Keys, projects and the audit log from the command line, on the database that a service works with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from holdtrue.cli.main import main
from holdtrue.errors import SpecError
from holdtrue.service import audit, auth, quotas, tenancy
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import AuditEntry


@pytest.fixture
def db(chosen: Database) -> Database:
    return chosen


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def command(*arguments: str, code: int = 0) -> Any:
        capfd.readouterr()
        assert main([*arguments, "--home", str(tmp_path), "--json"]) == code
        return json.loads(capfd.readouterr().out)

    return command


def test_a_first_start_makes_everything_once(db: Database):
    first = tenancy.bootstrap(db)
    assert first.key is not None
    assert tenancy.bootstrap(db).key is None
    with db.read() as session:
        found = auth.find(session, first.key, 10**9)
        assert found is not None
        assert found.principal.role == "provider"
        assert found.principal.may("admin")
        assert audit.verify(session).broken is None


def test_keys_of_the_command_line(db: Database, run: Any):
    tenancy.bootstrap(db)
    made = run("keys", "create", "ci", "--scope", "files.read", "--days", "2")
    assert made["key"].startswith("sk-")
    assert made["scopes"] == ["files.read"]
    listed = run("keys", "list")
    assert [key["name"] for key in listed if key["id"] == made["id"]] == ["ci"]
    assert made["key"] not in json.dumps(listed)
    turned = run("keys", "rotate", made["id"], "--grace", "100")
    run("keys", "revoke", turned["id"])
    with db.read() as session:
        assert auth.find(session, turned["key"], 2 * 10**9) is None
    assert run("keys", "create", "x", "--role", "boss", code=2)["error"]["type"] == "SpecError"
    assert "files.read" in run("keys", "create", "x", "--scope", "files.rea", code=2)["error"]["message"]
    run("keys", "revoke", "key-none", code=2)


def test_tenants_of_the_command_line(db: Database, run: Any):
    tenancy.bootstrap(db)
    organization = run("organizations", "create", "Acme", "--slug", "acme")[0]
    run("organizations", "create", "Acme", "--slug", "acme", code=2)
    run("organizations", "create", "Acme", "--slug", "A:b", code=2)
    project = run("projects", "create", "p", "--organization", organization["id"])[0]
    assert run("projects", "limits", project["id"], "--limit", "jobs_active=2")[0]["limits"] == {"jobs_active": 2}
    run("projects", "limits", project["id"], "--limit", "jobs=2", code=2)
    run("projects", "limits", project["id"], "--limit", "jobs_active=many", code=2)
    assert len(run("projects", "list")) == len(run("organizations", "list")) == 2
    assert run("keys", "create", "k", "--project", project["id"])["project_id"] == project["id"]


def test_no_service_is_made_by_looking(tmp_path: Path, run: Any):
    assert "holdtrue serve" in run("keys", "list", code=2)["error"]["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("column", ["actor", "action", "subject", "detail", "at", "previous", "digest"])
def test_a_changed_audit_entry_shows(db: Database, run: Any, column: str):
    tenancy.bootstrap(db)
    with db.write() as session:
        for number in range(4):
            audit.add(session, "me", "test", f"x{number}", now=number, detail={"n": number})
    assert run("audit", "verify")["broken"] is None
    changed = {"at": 99, "detail": {"n": 9}, "action": "other"}.get(column, "0" * 64)
    with db.write() as session:
        session.execute(update(AuditEntry).where(AuditEntry.seq == 4).values({column: changed}))
    assert run("audit", "verify", code=1)["broken"] == 4


def test_a_missing_audit_entry_shows(db: Database, run: Any):
    tenancy.bootstrap(db)
    with db.write() as session:
        for number in range(4):
            audit.add(session, "me", "test", "x", now=number)
        session.delete(session.get(AuditEntry, 3))
    assert run("audit", "verify", code=1)["broken"] == 4
    assert len(run("audit", "list", "--last", "2")) == 2


def test_keys_refuse_what_makes_no_sense(db: Database):
    tenancy.bootstrap(db)
    with db.write() as session:
        project = tenancy.project_of(session, None).id
        for wrong in ({"role": "x"}, {"scopes": ["x"]}, {"scopes": ["admin"]}, {"expires_at": 5}):
            with pytest.raises(SpecError):
                auth.create(session, project_id=project, name="k", now=10, **wrong)  # type: ignore[arg-type]
        made = auth.create(session, project_id=project, name="k", now=10, expires_at=20)
        assert auth.find(session, made.secret, 19) is not None
        assert auth.find(session, made.secret, 20) is None
        assert auth.find(session, made.secret + " ", 19) is None
        assert auth.find(session, made.secret + "x" * 300, 19) is None
        assert auth.find(session, "", 19) is None
        auth.revoke(session, made.row, 15)
        assert auth.find(session, made.secret, 15) is None
        with pytest.raises(SpecError):
            auth.rotate(session, made.row, now=16)


def test_tokens_of_a_day(db: Database):
    tenancy.bootstrap(db)
    limits = quotas.Limits(tokens_per_day=100)
    noon = 1_700_000_000 // 86_400 * 86_400 + 43_200
    with db.write() as session:
        project = tenancy.project_of(session, None).id
        quotas.add(session, project, "chat_tokens", 60, now=noon)
        quotas.check_tokens(session, project, limits, now=noon)
        quotas.add(session, project, "training_tokens", 30, now=noon)
        quotas.add(session, project, "chat_tokens", 10, now=noon)
        assert quotas.used_today(session, project, now=noon) == {"chat_tokens": 70, "training_tokens": 30}
        with pytest.raises(quotas.QuotaError) as caught:
            quotas.check_tokens(session, project, limits, now=noon)
        assert caught.value.retry_after == 43_200
        quotas.check_tokens(session, project, limits, now=noon + 43_200)


def test_a_project_is_erased_only_when_told_twice(db: Database, run: Any):
    tenancy.bootstrap(db)
    project = run("projects", "list")[0]["id"]
    assert "--yes" in run("projects", "erase", project, code=2)["error"]["message"]
    assert run("keys", "list")[0]["revoked_at"] is None
    assert run("projects", "erase", project, "--yes")["files"] == 0
    assert run("keys", "list")[0]["revoked_at"] is not None
    assert run("audit", "list")[0]["action"] == "project.erase"
    run("projects", "erase", "proj-none", "--yes", code=2)
