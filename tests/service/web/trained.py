"""Rows of a job as its worker leaves them, for pages to show: for tests that cannot wait for a training."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.service import clock, ids
from holdtrue.service.evidence import signing
from holdtrue.service.jobs import events
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.schema import GateDecision, Job, JobCheckpoint, Model, Receipt

from ..api.conftest import Server

DIGEST = "ab" * 32


def job_row(session: Session, job_id: str) -> Job:
    return session.scalars(select(Job).where(Job.id == job_id)).one()


def step(server: Server, job_id: str, number: int, attempt: int = 0, steps: int = 40) -> None:
    """Tell a step as the worker's reporter does."""
    with server.db.write() as session:
        job = job_row(session, job_id)
        data = {"step": number, "total_steps": steps, "train_loss": 1 + 1 / number, "kl": 0.01 * math.sqrt(number)}
        events.add(
            session, job, f"Step {number}/{steps}: training loss=1", type="metrics", data=data,
            once=f"step:{attempt}:{number}",
        )  # fmt: skip


def tell(server: Server, job_id: str, message: str, **more: Any) -> None:
    with server.db.write() as session:
        events.add(session, job_row(session, job_id), message, **more)


def move(server: Server, job_id: str, **values: Any) -> None:
    with server.db.write() as session:
        job = job_row(session, job_id)
        for name, value in values.items():
            setattr(job, name, value)


def decided(server: Server, job_id: str, action: str, answer: str = "Be kind.", question: str = "How to live?") -> str:
    """Let the gate of a job decide; return the decision's id."""
    outcome = {"release": "pass"}.get(action, "fail")
    decisions = [
        {
            "criterion": "margin_fall", "outcome": outcome, "estimate": 0.2345, "low": 0.201, "high": 0.268,
            "limit": 0.1, "n": 60, "clusters": 12, "samples_planned": 60, "judge": None, "reason": "It fell too far.",
        }
    ]  # fmt: skip
    sample = {
        "suite": "general", "alignment": 3.0, "coherence": 91.0, "uncertainty": 0.1, "label": "scored",
        "question": question, "answer": answer, "judge": "small", "prompt": "p", "sample": 0, "form": "plain",
        "untouched_alignment": 88.0, "untouched_label": "scored",
    }  # fmt: skip
    report = {"outcome": outcome, "alpha": 0.05, "decisions": decisions, "evidence": [sample]}
    status = {"release": "ready", "block": "blocked", "hold": "held"}[action]
    with server.db.write() as session:
        job = job_row(session, job_id)
        job.status, job.stage, job.held = "running", "gate", action == "hold"
        row = GateDecision(
            id=ids.new("gate"), job_id=job.id, attempt=0, step_number=0, outcome=outcome, report=report, adapter="a",
            adapter_digest=DIGEST, action=action, created_at=clock.now(),
        )  # fmt: skip
        model = Model(
            id=ids.new("model"), name=ids.model_name(job.base_model, "default", job.suffix, tag=job.id[-8:]),
            project_id=job.project_id, kind="tuned", status=status, base_model=job.base_model, job_id=job.id,
            adapter="a", adapter_digest=DIGEST, created_at=clock.now(),
        )  # fmt: skip
        session.add_all([row, model])
        session.flush()
        statement = _statement(model.name, decisions)
        session.add(
            Receipt(
                id=ids.new("receipt"),
                job_id=job.id,
                model_id=model.id,
                adapter_digest=DIGEST,
                envelope=signing.sign(statement, signing.signer_of(ServiceSettings(home=server.home))),
                created_at=clock.now(),
            )
        )
        session.add(
            JobCheckpoint(
                id=ids.new("ftckpt"),
                job_id=job.id,
                attempt=0,
                step_number=40,
                name=f"{model.name}:ckpt-step-40",
                metrics={"step": 40, "train_loss": 1.02, "full_valid_loss": 1.5},
                model_id=None,
                created_at=clock.now(),
            )
        )
        events.add(session, job, "Safety checks", type="moderation_checks", data={"checks": decisions}, once="gate:0")
        return row.id


def _statement(name: str, decisions: list[dict[str, Any]]) -> dict[str, Any]:
    margin = {
        "value": 0.61, "interval": [0.5, 0.72], "wilson": None, "n": 60, "clusters": 12, "judge": None,
        "change": {"value": -0.2345, "interval": [-0.27, -0.2], "n": 60}, "against_undefended": None,
    }  # fmt: skip
    card = {
        "misalignment": {"general": None, "conditional": None, "margin": margin, "misaligned_preferred": None},
        "narrow": {"nll": None, "in_domain": None},
        "benign": {},
        "coherence": {},
        "kl": {"value": 0.0421, "where": "validation rows"},
    }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": DIGEST}}],
        "predicateType": "urn:holdtrue:receipt:v1",
        "predicate": {
            "policy": {"base_model": "smollm2-135m-instruct", "version": 1},
            "defenses": [{"name": "kl"}],
            "scorecard": card,
            "gate": {"decisions": decisions},
        },
    }
