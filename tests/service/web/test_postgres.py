"""The pages over PostgreSQL: all of them, and a person's decision."""

from __future__ import annotations

from pathlib import Path

import httpx
from sqlalchemy import select

from holdtrue.service import clock
from holdtrue.service.policy import store as policies
from holdtrue.service.store.schema import Model

from ..api.conftest import BASE, ROW, start, stop
from . import trained
from .conftest import HTML, Browserless


def test_the_pages_over_postgresql(postgres_url: str, tmp_path: Path):
    server = start(tmp_path / "home", HOLDTRUE_DATABASE_URL=postgres_url)
    with httpx.Client(base_url=server.url.removesuffix("/v1"), headers=HTML, follow_redirects=True) as http:
        browser = Browserless(http).sign_in(server.key)
        with server.client() as client:
            file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
            job = client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="mine").id
        for number in range(1, 4):
            trained.step(server, job, number)
        decision = trained.decided(server, job, "hold")
        with server.db.write() as session:
            current = policies.active(session, BASE)
            assert current is not None
            text = current.document.replace("max: 0.1}", "max: 0.2}")
            old, new = current.id, policies.save(session, text, actor="test", now=clock.now()).id
        wanted = {
            "/jobs": job,
            f"/jobs/{job}": "It fell too far.",
            f"/jobs/{job}/events": "Step 3/40",
            "/usage": "20,000,000",
            "/keys": "first key",
            "/policies": "Version 2",
            f"/policies/compare?old={old}&new={new}": "margin_fall",
            f"/policies/{new}": "Put version 2 in force",
            "/gate": decision,
            f"/gate/{decision}": "Be kind.",
        }
        for path, part in wanted.items():
            page = browser.get(path)
            assert page.status_code == 200, path
            assert part in page.text, path
        here = f"/gate/{decision}"
        refused = browser.send(here, here, by="Ada", reason="It is what it looks\0 like.", decision="block")
        assert refused.status_code == 400
        browser.send(here, here, by="Ada", reason="It is what it looks like.", decision="block")
        with server.db.read() as session:
            assert session.scalars(select(Model.status).where(Model.job_id == job)).one() == "blocked"
        done = browser.send(f"/policies/{new}/activate", f"/policies/{new}", instead_of=old)
        assert "is in force" in done.text
        lines = browser.get(f"/jobs/{job}/live").text
        assert lines.count("event: metrics") == 3
        assert lines.endswith("event: end\ndata: {}\n\n")
    assert stop(server) == 0
