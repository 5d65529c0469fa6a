"""The service under load, and its reads among many jobs.

``python -m benchmarks.service load [--clients 50] [--seconds 120]`` starts a whole service on SQLite, lets it tune
SmolLM2 on real rows, and meanwhile has clients of OpenAI's read, upload and chat. ``python -m benchmarks.service growth
[--jobs 100 1000 10000 100000] [--database URL]`` fills a database with jobs and times reads over HTTP, each size in
turns. Both print one JSON document; what is measured is on the loopback address, clients beside the server.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rounds import say
from benchmarks.workload import data_file, machine, versions

BASE = "smollm2-135m-instruct"
PAGES = 20


@contextlib.contextmanager
def service(home: Path, *options: str, **environment: str) -> Iterator[tuple[str, str]]:
    """Start a service and yield its address and first key."""
    command = [sys.executable, "-m", "holdtrue.cli.main", "serve", "--port", "0", "--home", str(home), *options]
    log = home.with_suffix(".log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
        )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    found = re.search(r"http\S+", lines[0]), re.search(r"sk-\w+", lines[1])
    if None in found:
        raise SystemExit(log.read_text()[-2000:])
    try:
        yield tuple(each[0] for each in found if each)  # type: ignore[misc]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile in milliseconds, and how many there are."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {"p50_ms": round(1e3 * statistics.median(ordered), 1), "p95_ms": round(1e3 * p95, 1), "n": len(ordered)}


# Under load


class Clients:
    """Clients that each do one thing after another until told to stop."""

    def __init__(self, url: str, key: str, job: str, rows: bytes) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=url, api_key=key, max_retries=0, timeout=300)
        self.job, self.rows = job, rows
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.failed: collections.Counter[str] = collections.Counter()
        self.stopping = threading.Event()

    def act(self, kind: str) -> None:
        """Do one thing."""
        jobs = self.client.fine_tuning.jobs
        match kind:
            case "list jobs":
                jobs.list(limit=PAGES)
            case "retrieve job":
                jobs.retrieve(self.job)
            case "list events":
                jobs.list_events(self.job, limit=PAGES)
            case "list models":
                self.client.models.list()
            case "upload":
                name = f"{random.random()}.jsonl"
                file = self.client.files.create(file=(name, self.rows), purpose="fine-tune")
                self.client.files.delete(file.id)
            case _:
                messages: Any = [{"role": "user", "content": f"Name {random.randint(2, 99)} rivers."}]
                self.client.chat.completions.create(model=BASE, messages=messages, max_tokens=8)

    def run(self, kinds: Sequence[str]) -> None:
        """Do what ``kinds`` says, in turns."""
        from openai import APIError, APIStatusError

        for kind in (kinds[n % len(kinds)] for n in range(10**9)):
            if self.stopping.is_set():
                return
            begun = time.perf_counter()
            try:
                self.act(kind)
                self.seconds[kind].append(time.perf_counter() - begun)
            except APIStatusError as error:
                self.failed[f"{kind}: {error.status_code}"] += 1
            except APIError as error:
                self.failed[f"{kind}: {type(error).__name__}"] += 1


def load(clients: int, seconds: float) -> dict[str, Any]:
    """Return what clients saw while a job trained, and whether the job's events are whole."""
    with data_file()[0].open("rb") as file:
        content = b"".join(itertools.islice(file, 48))
    with tempfile.TemporaryDirectory(prefix="holdtrue-load-") as folder:
        with service(Path(folder) / "home", HOLDTRUE_THREADS="1") as (url, key):
            from openai import OpenAI

            plain = OpenAI(base_url=url, api_key=key, timeout=300)
            file_id = plain.files.create(file=("train.jsonl", content), purpose="fine-tune").id
            job = plain.fine_tuning.jobs.create(model=BASE, training_file=file_id).id
            plain.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
            while plain.fine_tuning.jobs.retrieve(job).status != "running":
                time.sleep(0.2)
            crowd = Clients(url, key, job, content)
            reads = ["list jobs", "retrieve job", "list events", "list models"]
            ways = [reads, reads, reads, ["upload", *reads], ["chat"]]
            threads = [threading.Thread(target=crowd.run, args=(ways[n % len(ways)],)) for n in range(clients)]
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            during = plain.fine_tuning.jobs.retrieve(job).status
            crowd.stopping.set()
            for thread in threads:
                thread.join()
            say(f"{clients} clients stopped; the job is {during}")
            while (now := plain.fine_tuning.jobs.retrieve(job)).status in ("queued", "running"):
                time.sleep(1)
            told = [event.data for event in plain.fine_tuning.jobs.list_events(job, limit=100) if event.data]
        steps = sorted(int(data["step"]) for data in told if "step" in data and "train_loss" in data)  # type: ignore[index]
        return {
            "clients": clients,
            "seconds": seconds,
            "job_during": during,
            "job_end": now.status,
            "steps_told": len(steps),
            "events_whole": steps == list(range(1, len(steps) + 1)),
            "failed": dict(crowd.failed),
            "requests_per_second": round(sum(map(len, crowd.seconds.values())) / seconds, 1),
            "latency": {kind: spread(found) for kind, found in sorted(crowd.seconds.items())},
        }


# Among many jobs


def fill(db: Any, template: str, upto: int) -> str:
    """Copy a job with its file, events and metadata until there are ``upto``; return the id of one in the middle."""
    from sqlalchemy import func, insert, select, text

    from holdtrue.service import ids
    from holdtrue.service.store.schema import File, Job, JobEvent, JobMetadata

    with db.read() as session:
        job = session.execute(select(Job.__table__).where(Job.id == template)).mappings().one()
        events = session.execute(select(JobEvent.__table__).where(JobEvent.job_id == template)).mappings().all()
        file = session.execute(select(File.__table__).where(File.id == job["training_file"])).mappings().one()
        have = session.scalar(select(func.count()).select_from(Job))
    while have < upto:
        new = [ids.new("ftjob") for _ in range(min(2000, upto - have))]
        with db.write() as session:
            session.execute(insert(Job), [{**job, "id": i, "seq": None} | {"status": "succeeded"} for i in new])
            told = [{**event, "id": ids.new("ftevent"), "seq": None, "job_id": i} for i in new for event in events]
            session.execute(insert(JobEvent), told)
            copies = [{**file, "id": ids.new("file"), "seq": None, "bytes": 1, "blob": None} for _ in new]
            session.execute(insert(File), copies)
            pairs = [{"job_id": i, "key": "team", "value": f"t{n % 5}"} for n, i in enumerate(new)]
            session.execute(insert(JobMetadata), pairs)
        have += len(new)
    with db.write() as session:
        session.execute(text("ANALYZE"))  # PostgreSQL does so by itself, a minute later
    with db.read() as session:
        query = select(Job.id).order_by(Job.seq).offset(upto // 2).limit(1)
        return str(session.scalar(query))


def reads(http: Any, job: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed."""
    paths = {
        "list jobs": "/fine_tuning/jobs?limit=20",
        "list jobs, from the middle": f"/fine_tuning/jobs?limit=20&after={job}",
        "list jobs, one team's": "/fine_tuning/jobs?limit=20&metadata[team]=t7",
        "retrieve job": f"/fine_tuning/jobs/{job}",
        "list events": f"/fine_tuning/jobs/{job}/events",
        "list checkpoints": f"/fine_tuning/jobs/{job}/checkpoints",
        "list files": "/files?limit=20",
        "list models": "/models",
        "usage": "/holdtrue/usage",
    }
    return {name: lambda path=path: http.get(path).raise_for_status() for name, path in paths.items()}


def growth(sizes: Sequence[int], database: str | None, rounds: int = 60) -> dict[str, Any]:
    """Return latencies of reads by the number of jobs, and how they grow from the fewest to the most."""
    import httpx

    from holdtrue.service.settings import ServiceSettings
    from holdtrue.service.store.database import Database

    with tempfile.TemporaryDirectory(prefix="holdtrue-growth-") as folder:
        home = Path(folder) / "home"
        environment = {"HOLDTRUE_LIMITS": json.dumps({"requests_per_minute": 10**9})}
        if database is not None:
            environment["HOLDTRUE_DATABASE_URL"] = database
        with service(home, "--role", "api", **environment) as (url, key):
            db = Database(database or ServiceSettings(home=home).database)
            http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60)
            line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
            form = {"files": {"file": ("a.jsonl", f"{line}\n" * 10)}, "data": {"purpose": "fine-tune"}}
            file_id = http.post("/files", **form).raise_for_status().json()["id"]
            wish = {"model": BASE, "training_file": file_id, "metadata": {"team": "t0"}}
            template = http.post("/fine_tuning/jobs", json=wish).raise_for_status().json()["id"]
            http.post(f"/fine_tuning/jobs/{template}/cancel").raise_for_status()
            found: dict[int, dict[str, dict[str, float]]] = {}
            for size in sizes:
                middle = fill(db, template, size)
                say(f"{size} jobs")
                taken: dict[str, list[float]] = collections.defaultdict(list)
                ways = reads(http, middle)
                for turn in range(rounds + 5):
                    for name, read in ways.items():
                        begun = time.perf_counter()
                        read()
                        if turn >= 5:  # the first warm what is kept
                            taken[name].append(time.perf_counter() - begun)
                found[size] = {name: spread(each) for name, each in taken.items()}
            db.close()
            first, last = found[sizes[0]], found[sizes[-1]]
            return {
                "database": "SQLite" if database is None else "PostgreSQL",
                "latency": found,
                "growth": {name: round(last[name]["p50_ms"] / first[name]["p50_ms"], 2) for name in first},
            }


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    loaded = ways.add_parser("load")
    loaded.add_argument("--clients", type=int, default=50)
    loaded.add_argument("--seconds", type=float, default=120.0)
    grown = ways.add_parser("growth")
    grown.add_argument("--jobs", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    grown.add_argument("--database", help="an empty PostgreSQL database's URL; otherwise SQLite")
    asked = parser.parse_args()
    document = load(asked.clients, asked.seconds) if asked.way == "load" else growth(sorted(asked.jobs), asked.database)
    print(json.dumps({**document, "machine": machine(), "versions": versions()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
