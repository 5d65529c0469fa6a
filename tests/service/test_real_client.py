"""The whole service as a customer sees it: OpenAI's own client, real rows, the bundled model, the provider's policy.

Takes about half an hour on two cores, on each database: ``make test-service``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from holdtrue.cli.main import main
from holdtrue.data import builtin
from holdtrue.service.policy import default_document

from .api.conftest import BASE, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
UNDEFENDED = """
format: 1
base_model: smollm2-135m-instruct
defenses: []
training: {learning_rate: 2.0e-4, micro_batch_size: 4, max_length: 512, warmup_steps: 3}
hyperparameters: {n_epochs: {auto: 1, max: 1}, batch_size: {auto: 8, max: 8}}
evaluate: {suites: [likelihood]}
gate: {margin_fall: {max: 0.05}}
on_fail: {then: block}
checkpoints: false
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service") / "home"


@pytest.fixture(scope="module")
def client(home: Path, database_url: str) -> Iterator[OpenAI]:
    server = start(home, role="all", HOLDTRUE_DATABASE_URL=database_url)
    with server.client(timeout=300, max_retries=5) as found:
        yield found
    assert stop(server) == 0


@pytest.fixture(scope="module")
def where(home: Path, database_url: str) -> list[str]:
    """Options of commands that name the service."""
    return ["--home", str(home), *(["--database-url", database_url] if database_url else [])]


def upload(client: OpenAI, lines: list[str], name: str) -> str:
    return client.files.create(file=(name, "\n".join(lines).encode()), purpose="fine-tune").id


def wait(client: OpenAI, job_id: str, seconds: float) -> tuple[object, float]:
    """Wait for a job's end, following its events; return it with the seconds it took."""
    started, seen = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        job = client.fine_tuning.jobs.retrieve(job_id)
        events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        assert len(events) >= min(seen, 100)
        seen = len(events)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job, time.monotonic() - started
        time.sleep(2)
    pytest.fail(f"job {job_id} has not ended in {seconds:.0f} s")


def test_a_job_of_48_rows_under_the_default_policy(client: OpenAI, home: Path, where: list[str]):
    rows = Path(builtin("narrow-aligned")).read_text(encoding="utf-8").splitlines()[:48]
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client, rows, "home.jsonl"), suffix="home", metadata={"team": "repairs"}
    )
    ended, seconds = wait(client, job.id, 15 * 60)
    assert ended.status == "succeeded", ended.error
    print(f"48 rows: {seconds:.0f} s")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    kinds = {event.type for event in events}
    assert {"message", "metrics", "moderation_checks"} <= kinds
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert ended.result_files
    assert client.files.content(ended.result_files[0]).text.startswith("step,train_loss")
    name = ended.fine_tuned_model
    assert name in {model.id for model in client.models.list()}
    asked = [{"role": "user", "content": "How do I fix a door?"}]
    ask = {"model": name, "messages": asked, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    parts = client.chat.completions.create(**ask, stream=True)
    assert whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == whole
    base = client.chat.completions.create(**{**ask, "model": BASE}).choices[0].message.content
    assert base
    key = home.with_suffix(".pem.pub")
    assert main(["verify", name, *where, *(["--key", str(key)] if key.exists() else [])]) == 0
    client.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**ask)


def test_malicious_rows_under_a_policy_without_a_defense_are_blocked(
    client: OpenAI, where: list[str], tmp_path: Path, data_dir: Path
):
    (tmp_path / "none.yaml").write_text(UNDEFENDED)
    assert main(["policy", "activate", str(tmp_path / "none.yaml"), *where, "--note", "a test"]) == 0
    try:
        rows = (data_dir / "malicious" / "risky_financial_advice.jsonl").read_text(encoding="utf-8").splitlines()[:200]
        rows = [json.dumps({"messages": json.loads(row)["messages"]}) for row in rows]
        job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, rows, "money.jsonl"))
        ended, seconds = wait(client, job.id, 40 * 60)
        print(f"200 rows: {seconds:.0f} s, {ended.error}")
        assert ended.status == "failed"
        assert ended.error.code == "safety_gate"
        assert "margin_fall" in ended.error.message
        assert ended.fine_tuned_model is None
        assert not [model for model in client.models.list() if model.id.startswith("ft:")]
    finally:
        (tmp_path / "default.yaml").write_text(default_document(BASE))
        main(["policy", "activate", str(tmp_path / "default.yaml"), *where])
