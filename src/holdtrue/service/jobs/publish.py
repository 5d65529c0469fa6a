"""What comes of a trained adapter: released, kept back or held, in one transaction with the job's own end."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from holdtrue.errors import HoldtrueError
from holdtrue.runs import Run
from holdtrue.service import audit, clock, ids, quotas
from holdtrue.service.evidence import signing
from holdtrue.service.evidence.receipt import Issue, build
from holdtrue.service.jobs import events, lifecycle
from holdtrue.service.jobs.leases import Lease
from holdtrue.service.policy import PolicyDocument
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.schema import (
    File,
    GateDecision,
    Job,
    JobCheckpoint,
    JobState,
    Model,
    Organization,
    Policy,
    Receipt,
)

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

RESULT_BYTES = 2**30
_MEASURED = {
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_accuracy",
}
"""The column of a result file, and the name of the run's metric."""
_MODEL_STATUS = {"release": "ready", "block": "blocked", "hold": "held"}
_DONE = {"pass": "passed", "fail": "failed", "undecided": "not decided"}


class DecisionError(HoldtrueError):
    """A person's decision cannot be taken: there is none to take, or it has been taken."""


@dataclass(frozen=True)
class Judged:
    """An adapter that has been through its gate.

    Attributes:
        run: whose adapter and gate report these are.
        attempt: which training.
        step: of the checkpoint, or 0 for the final adapter.
    """

    run: Run
    attempt: int
    step: int = 0

    @property
    def gate(self) -> Mapping[str, Any]:
        """The gate's report."""
        report = self.run.gate
        assert report is not None
        return report


def action_after(document: PolicyDocument, outcome: str, attempt: int) -> str:
    """Return what the policy wants after a gate: ``release``, ``retrain``, ``block`` or ``hold``."""
    if outcome == "pass":
        return "release"
    return "retrain" if attempt < len(document.on_fail.retrain) else document.on_fail.then


def publish(
    lease: Lease,
    final: Judged,
    checkpoints: Sequence[Judged],
    document: PolicyDocument,
    blobs: Blobs,
    signer: CryptoSigner,
) -> str:
    """Let happen what the policy says, and return it.

    The adapters are in the object store before the transaction, which makes all else at once: the gate's decisions,
    the models, their receipts, the result file, the events, the end of the job.

    Args:
        lease: under which the job was worked on.
        final: the job's adapter.
        checkpoints: earlier ones, each after a gate of its own; released where both passed.
        document: the policy that the job began with.
        blobs: the object store.
        signer: of receipts.

    Raises:
        LeaseLostError: somebody else holds the job; nothing has happened.
    """
    action = action_after(document, str(final.gate["outcome"]), final.attempt)
    stored = {judged.step: blobs.put_tree(judged.run.adapter) for judged in (final, *checkpoints)}
    text = None if action == "retrain" else result_csv(final.run)
    result = None if text is None else blobs.put(io.BytesIO(text), limit=RESULT_BYTES)
    past: list[str] = []
    with lease.write(project=True) as (session, job):
        _decide(session, job, final, *stored[0], action)
        events.add(
            session,
            job,
            gate_message(final.gate, action),
            level="info" if action == "release" else "warn",
            type="moderation_checks",
            data={"outcome": final.gate["outcome"], "action": action, "checks": final.gate["decisions"]},
            once=f"gate:{final.attempt}",
        )
        report = (final.run.marker("train") or {}).get("report", {})
        tokens = int(report.get("tokens", 0))
        quotas.charge_training(session, job, tokens, now=clock.now())
        job.trained_tokens = (job.trained_tokens or 0) + tokens
        if action == "retrain":
            job.attempt += 1
            events.add(
                session, job, "Training again under the policy's stronger defenses", once=f"retrain:{job.attempt}"
            )
            return action
        assert text is not None
        assert result is not None
        name = model_name(session, job)
        _model(session, job, final, *stored[0], name, action, signer)
        if action == "release":
            for judged in checkpoints:
                own = "release" if judged.gate["outcome"] == "pass" else "block"
                _decide(session, job, judged, *stored[judged.step], own)
                _model(session, job, judged, *stored[judged.step], name, own, signer)
        job.result_file = _result_file(session, job, result)
        for state in session.scalars(select(JobState).where(JobState.job_id == job.id)):
            past += [key for key in (state.rows, state.rest) if key is not None]
            session.delete(state)
        _end(session, job, name, final.gate, action)
    for key in past:
        blobs.delete(key)
    return action


def _end(session: Session, job: Job, name: str, gate: Mapping[str, Any], action: str) -> None:
    match action:
        case "release":
            job.fine_tuned_model = name
            lifecycle.move(session, job, "succeeded", "The job has successfully completed", data={"model": name})
        case "block":
            lifecycle.move(
                session,
                job,
                "failed",
                "The job failed: its model was not released",
                error=_blocked(gate),
                level="error",
            )
        case _:
            job.held, job.stage = True, "gate"
            job.lease_owner, job.lease_until = None, None
            job.fence += 1
            events.add(session, job, "The model waits for a person's decision", once="held")
    audit.add(session, "system", f"model.{action}", job.id, now=clock.now(), detail={"outcome": gate["outcome"]})


def decide(
    session: Session, decision_id: str, *, release: bool, by: str, reason: str, signer: CryptoSigner
) -> GateDecision:
    """Take a person's decision on an adapter that the policy held or blocked, and sign a receipt that says so.

    Args:
        session: of a writing transaction.
        decision_id: of the gate's decision.
        release: whether customers may use the model.
        by: who decides.
        reason: why; both are kept and signed.
        signer: of receipts.

    Raises:
        DecisionError: no such decision, no name or reason, or one has been taken.
    """
    if not by.strip() or not reason.strip():
        raise DecisionError("a decision needs a name and a reason")
    owner = select(Job.project_id).join(GateDecision, GateDecision.job_id == Job.id)
    project = session.scalar(owner.where(GateDecision.id == decision_id))
    if project is not None:
        quotas.lock_project(session, project)
    # As they are under the lock: who asks may have looked at them before.
    fresh = {"populate_existing": True}
    locked = select(GateDecision).where(GateDecision.id == decision_id).with_for_update()
    row = session.scalar(locked, execution_options=fresh)
    if row is None or not _is_for_a_person(row):
        raise DecisionError(f"there is nothing to decide on {decision_id!r}")
    if row.override is not None:
        raise DecisionError(f"{row.override_by} has decided on {decision_id} already: {row.override}")
    job = session.scalars(select(Job).where(Job.id == row.job_id).with_for_update(), execution_options=fresh).one()
    model = session.scalars(
        select(Model).where(Model.job_id == job.id, Model.kind == "tuned", Model.adapter_digest == row.adapter_digest)
    ).first()
    if model is None or model.status == "deleted" or job.status == "cancelled":
        raise DecisionError(f"the model of {job.id} is no longer there")
    now, word = clock.now(), "release" if release else "block"
    row.override, row.override_by, row.override_reason, row.override_at = word, by.strip(), reason.strip(), now
    model.status = _MODEL_STATUS[word]
    if release:
        job.fine_tuned_model = model.name
        lifecycle.move(session, job, "succeeded", "A person has released the model", data={"model": model.name})
    elif job.status == "running":
        lifecycle.move(
            session, job, "failed", "A person has not released the model", error=_blocked(row.report), level="error"
        )
    last = session.scalars(
        select(Receipt).where(Receipt.model_id == model.id).order_by(Receipt.created_at.desc(), Receipt.id)
    ).first()
    if last is not None:
        statement = signing.payload(last.envelope)
        statement["predicate"]["override"] = {
            "decision": word,
            "by": row.override_by,
            "reason": row.override_reason,
            "at": now,
        }
        _sign(session, job, model, statement, signer)
    audit.add(session, by, f"gate.{word}", job.id, now=now, detail={"decision": row.id, "reason": reason})
    return row


def is_open(row: GateDecision) -> bool:
    """Say whether a person may still decide on an adapter: the policy held or blocked it, and nobody has spoken."""
    return _is_for_a_person(row) and row.override is None


def _is_for_a_person(row: GateDecision) -> bool:
    return row.action in ("hold", "block") and not row.step_number


def gate_message(gate: Mapping[str, Any], action: str) -> str:
    """Return a gate's outcome in words, each criterion with figure and threshold."""
    parts = [_criterion(each) for each in gate["decisions"]]
    then = {"release": "the model is released", "retrain": "it is trained again", "block": "the model is not released"}
    tail = then.get(action, "a person decides")
    return f"Safety checks {_DONE[gate['outcome']]}: {'; '.join(parts)}. Then {tail}"


def _criterion(each: Mapping[str, Any]) -> str:
    figure = "not measured" if each.get("estimate") is None else f"{each['estimate']:.3f}"
    if each.get("low") is not None and each.get("high") is not None:
        figure += f" [{each['low']:.3f}, {each['high']:.3f}]"
    return f"{each['criterion']} {figure}, limit {each['limit']}, {each['outcome']}"


def _blocked(gate: Mapping[str, Any]) -> dict[str, Any]:
    missed = "; ".join(_criterion(each) for each in gate["decisions"] if each["outcome"] != "pass")
    return {
        "code": "safety_gate",
        "message": "The tuned model was not released: compared with its base it changed more than the provider allows "
        f"({missed}). Look for harmful or one-sided examples in the training file, take them out, mix in ordinary "
        "helpful ones, or train for fewer epochs; the provider can look at the evidence and decide otherwise.",
        "param": "training_file",
    }


def model_name(session: Session, job: Job) -> str:
    """Return the name that a job's model has, or will have."""
    slug = session.get_one(Organization, job.organization_id).slug
    return ids.model_name(job.base_model, slug, job.suffix, tag=job.id[-8:])


def _decide(session: Session, job: Job, judged: Judged, key: str, digest: str, action: str) -> None:
    session.add(
        GateDecision(
            id=ids.new("gate"),
            job_id=job.id,
            attempt=judged.attempt,
            step_number=judged.step,
            outcome=judged.gate["outcome"],
            report=dict(judged.gate),
            adapter=key,
            adapter_digest=digest,
            action=action,
            override=None,
            override_by=None,
            override_reason=None,
            override_at=None,
            created_at=clock.now(),
        )
    )


def _model(
    session: Session,
    job: Job,
    judged: Judged,
    key: str,
    digest: str,
    name: str,
    action: str,
    signer: CryptoSigner,
) -> None:
    row = Model(
        id=ids.new("model"),
        name=f"{name}:ckpt-step-{judged.step}" if judged.step else name,
        project_id=job.project_id,
        kind="checkpoint" if judged.step else "tuned",
        status=_MODEL_STATUS[action],
        base_model=job.base_model,
        job_id=job.id,
        adapter=key,
        adapter_digest=digest,
        created_at=clock.now(),
        deleted_at=None,
    )
    session.add(row)
    session.flush()
    for checkpoint in session.scalars(
        select(JobCheckpoint).where(
            JobCheckpoint.job_id == job.id,
            JobCheckpoint.attempt == judged.attempt,
            JobCheckpoint.step_number == (judged.step or _steps(judged.run)),
        )
    ):
        checkpoint.model_id, checkpoint.name = row.id, row.name
    policy = session.get_one(Policy, job.policy_id)
    parent = session.scalar(select(Model.adapter_digest).where(Model.id == job.parent_model_id))
    issue = Issue(
        model=row.name,
        adapter_digest=digest,
        job=job.id,
        attempt=judged.attempt,
        policy={"base_model": policy.base_model, "version": policy.version, "sha256": policy.digest},
        action=action,
        parent=parent,
    )
    _sign(session, job, row, build(judged.run, issue), signer)


def _sign(session: Session, job: Job, model: Model, statement: Mapping[str, Any], signer: CryptoSigner) -> None:
    last = session.scalar(select(func.max(Receipt.created_at)).where(Receipt.model_id == model.id))
    session.add(
        Receipt(
            id=ids.new("receipt"),
            job_id=job.id,
            model_id=model.id,
            adapter_digest=str(model.adapter_digest),
            envelope=signing.sign(statement, signer),
            created_at=max(clock.now(), 0 if last is None else last + 1),  # the newest is the one that holds
        )
    )


def _steps(run: Run) -> int:
    return int((run.marker("train") or {}).get("report", {}).get("steps", 0))


def _result_file(session: Session, job: Job, blob: Any) -> str:
    row = File(
        id=ids.new("file"),
        project_id=job.project_id,
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        bytes=blob.bytes,
        sha256=blob.sha256,
        blob=blob.key,
        created_at=clock.now(),
        expires_at=None,
        deleted_at=None,
        status_details=None,
    )
    session.add(row)
    session.flush()
    return row.id


def result_csv(run: Run) -> bytes:
    """Return a run's metrics by step, in the columns of OpenAI's result files; what is not measured stays empty."""
    rows: dict[int, dict[str, Any]] = {}
    for metrics in run.metrics():
        row = rows.setdefault(metrics["step"], {"step": metrics["step"]})
        for column, name in _MEASURED.items():
            if name in metrics:
                row[column] = metrics[name]
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, ("step", *_MEASURED), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue().encode()
