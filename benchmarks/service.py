"""The service under load, and its reads among many jobs.

``python -m benchmarks.service load [--clients 50] [--seconds 120] [--database URL]`` starts a whole service, lets it
tune SmolLM2 on real rows, and meanwhile has clients of OpenAI's read, upload and chat. ``python -m benchmarks.service
growth [--jobs 100 1000 10000 100000] [--rounds 60] [--database URL...]`` fills a database for each size with jobs and
times reads over HTTP, the sizes in turns. Both are on SQLite unless empty databases of PostgreSQL's are named. Both
print one JSON document, and exit with 1 where what they saw is not as it should be; what is measured is on the loopback
address, clients beside the server.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rounds import say
from benchmarks.workload import data_file, machine, versions

BASE = "smollm2-135m-instruct"
PAGES = 20
MOST_GROWTH = 2.0
"""How much slower a read may be among the most jobs than among the fewest."""


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


def over(database: str | None, folder: Path) -> dict[str, str]:
    """Return the variables of a service over a database; one that hosts could share wants a named signing key."""
    if database is None:
        return {}
    from holdtrue.service.evidence import signing

    signing.make_key(folder / "signing-key.pem")
    return {"HOLDTRUE_DATABASE_URL": database, "HOLDTRUE_SIGNING_KEY": str(folder / "signing-key.pem")}


def kind_of(database: str | None) -> str:
    """Return the name of a database's kind."""
    return "SQLite" if database is None else "PostgreSQL"


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


def load(clients: int, seconds: float, database: str | None = None) -> dict[str, Any]:
    """Return what clients saw while a job trained, and whether the job's events are whole."""
    with data_file()[0].open("rb") as file:
        content = b"".join(itertools.islice(file, 48))
    with tempfile.TemporaryDirectory(prefix="holdtrue-load-") as folder:
        environment = {"HOLDTRUE_THREADS": "1", **over(database, Path(folder))}
        with service(Path(folder) / "home", **environment) as (url, key):
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
        trained: list[Any] = [data for data in told if "step" in data and "train_loss" in data]  # type: ignore[operator]
        steps = sorted(int(data["step"]) for data in trained)
        planned = max((int(data["total_steps"]) for data in trained), default=0)
        return {
            "database": kind_of(database),
            "clients": clients,
            "seconds": seconds,
            "job_during": during,
            "job_end": now.status,
            "steps_told": len(steps),
            "steps_planned": planned,
            "events_whole": planned > 0 and steps == list(range(1, planned + 1)),
            "failed": dict(crowd.failed),
            "requests_per_second": round(sum(map(len, crowd.seconds.values())) / seconds, 1),
            "latency": {kind: spread(found) for kind, found in sorted(crowd.seconds.items())},
        }


# Among many jobs


class Read(NamedTuple):
    """What is timed: a path, how many rows its page must have (none are quick), and whether it may be refused."""

    path: str
    least: int = 0
    most: int = 10**6
    may_be_refused: bool = False

    def get(self, http: Any) -> None:
        """Ask, and insist on the answer that was meant."""
        answer = http.get(self.path)
        if answer.status_code == 400 and self.may_be_refused:
            return
        found = answer.raise_for_status().json().get("data", [])
        if not self.least <= len(found) <= self.most:
            raise SystemExit(f"{self.path} has {len(found)} rows, and {self.least} to {self.most} were meant")


def reads(job: str, model: str) -> dict[str, Read]:
    """Return what is timed, by what it is called."""
    jobs = "/fine_tuning/jobs?limit=20"
    return {
        "list jobs": Read(jobs, 20),
        "list jobs, from the middle": Read(f"{jobs}&after={job}", 20),
        "list jobs, one team's": Read(f"{jobs}&metadata[team]=t3", 20),
        "list jobs, those of the oldest alone": Read(f"{jobs}&metadata[first]=yes", 20),
        "list jobs, two pairs": Read(f"{jobs}&metadata[team]=t3&metadata[shift]=day", 10),
        "list jobs, two pairs that never meet": Read(
            f"{jobs}&metadata[shift]=day&metadata[night]=yes", most=0, may_be_refused=True
        ),
        "list jobs, a neighbor's pair": Read(f"{jobs}&metadata[elsewhere]=yes", most=0),
        "list jobs, without metadata": Read(f"{jobs}&metadata=null", most=0),
        "retrieve job": Read(f"/fine_tuning/jobs/{job}"),
        "list events": Read(f"/fine_tuning/jobs/{job}/events", 2),
        "list checkpoints": Read(f"/fine_tuning/jobs/{job}/checkpoints", 1),
        "list files": Read("/files?limit=20", 20),
        "list files, for training": Read("/files?limit=20&purpose=fine-tune", 20),
        "list models": Read("/models?limit=20", 20),
        "retrieve model": Read(f"/models/{model}"),
        "usage": Read("/holdtrue/usage"),
    }


class Filler:
    """Copies a job with all that it leaves behind, spread as unkindly as may be.

    Each job has events, a checkpoint, metadata, a model, results and a training file that was deleted; 20 files for
    training lie behind all of them. Each comes with one of a neighbor's, whose pair is on no job of the project.
    """

    def __init__(self, db: Any, template: str) -> None:
        from sqlalchemy import func, select

        from holdtrue.service import ids, tenancy
        from holdtrue.service.store.schema import File, Job, JobEvent

        def row(query: Any) -> dict[str, Any]:
            return {name: value for name, value in query.mappings().one().items() if name != "seq"}

        self.db, self.have = db, 0
        with db.write() as session:
            self.job = row(session.execute(select(Job.__table__).where(Job.id == template)))
            self.file = row(session.execute(select(File.__table__).where(File.id == self.job["training_file"])))
            self.file |= {"bytes": 1, "blob": None}
            events = session.execute(select(JobEvent.__table__).where(JobEvent.job_id == template)).mappings().all()
            self.events = [{name: value for name, value in each.items() if name != "seq"} for each in events]
            self.next = int(session.scalar(select(func.max(Job.seq)))) + 1
            self.neighbor = tenancy.create_project(session, self.job["organization_id"], "neighbor", now=1).id
            self._insert(session, File, [{**self.file, "id": ids.new("file")} for _ in range(20)])

    def _insert(self, session: Any, table: Any, rows: Sequence[dict[str, Any]]) -> None:
        from sqlalchemy import insert

        session.execute(insert(table.__table__), rows)

    def fill(self, upto: int) -> tuple[str, str]:
        """Go on until the project has so many jobs; return the id of one in the middle, and a model's name."""
        from sqlalchemy import select, text

        from holdtrue.service.store.schema import Job, Model

        while self.have < upto:
            count = min(2000, upto - self.have)
            with self.db.write() as session:
                self._add(session, count)
            self.have += count
        with self.db.write() as session:
            session.execute(text("ANALYZE"))  # PostgreSQL does so by itself, a minute later
        with self.db.read() as session:
            own = Job.project_id == self.job["project_id"]
            middle = session.scalar(select(Job.id).where(own).order_by(Job.seq).offset(upto // 2).limit(1))
            name = session.scalar(select(Model.name).where(Model.job_id == middle))
            return str(middle), str(name)

    def _add(self, session: Any, count: int) -> None:
        from holdtrue.service import ids
        from holdtrue.service.store.schema import File, Job, JobCheckpoint, JobEvent, JobMetadata, Model

        names = [(number, ids.new("ftjob"), ids.new("ftjob")) for number in range(self.have, self.have + count)]
        plain = {**self.job, "status": "succeeded", "tagged": True}
        jobs = []
        for number, own, other in names:
            jobs.append({**plain, "id": own, "seq": self.next + 2 * number})
            jobs.append({**plain, "id": other, "seq": self.next + 2 * number + 1, "project_id": self.neighbor})
        self._insert(session, Job, jobs)
        self._insert(session, JobMetadata, [pair for each in names for pair in self._pairs(*each)])
        told = [{**event, "id": ids.new("ftevent"), "job_id": own} for _, own, _ in names for event in self.events]
        self._insert(session, JobEvent, told)
        files = [{**self.file, "id": ids.new("file"), "deleted_at": 1} for _ in names]
        files += [{**self.file, "id": ids.new("file"), "purpose": "fine-tune-results"} for _ in names]
        self._insert(session, File, files)
        model = {
            "project_id": self.job["project_id"], "kind": "tuned", "status": "ready", "base_model": BASE,
            "adapter": "t-none", "adapter_digest": "0" * 64, "created_at": 1,
        }  # fmt: skip
        models = [{**model, "id": ids.new("model"), "job_id": own, "name": f"ft:{own}"} for _, own, _ in names]
        self._insert(session, Model, models)
        checkpoint = {"attempt": 0, "step_number": 1, "name": "c", "metrics": {"step": 1}, "created_at": 1}
        self._insert(
            session, JobCheckpoint, [{**checkpoint, "id": ids.new("ftckpt"), "job_id": own} for _, own, _ in names]
        )

    def _pairs(self, number: int, own: str, other: str) -> Iterator[dict[str, Any]]:
        seq = self.next + 2 * number
        found = {"team": f"t{number % 5}", **({"night": "yes"} if number % 2 else {"shift": "day"})}
        found |= {"first": "yes"} if number < 20 else {}
        for key, value in found.items():
            yield {"job_id": own, "project_id": self.job["project_id"], "seq": seq, "key": key, "value": value}
        yield {"job_id": other, "project_id": self.neighbor, "seq": seq + 1, "key": "elsewhere", "value": "yes"}


def growth(sizes: Sequence[int], databases: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return latencies of reads by the number of jobs, how they grow to the most, and which of them too much.

    Each size has a service and a database of its own, and all take turns: what else the machine does falls on all.

    Args:
        sizes: numbers of jobs.
        databases: URLs of empty PostgreSQL databases, one for each size; none for SQLite.
        rounds: how often each read is timed at each size.
    """
    if databases and len(databases) != len(sizes):
        raise SystemExit(f"{len(sizes)} sizes need as many empty databases, and {len(databases)} are given")
    with tempfile.TemporaryDirectory(prefix="holdtrue-growth-") as folder, contextlib.ExitStack() as open_now:
        timed: dict[int, tuple[Any, dict[str, Read]]] = {}
        for size, database in itertools.zip_longest(sizes, databases):
            timed[size] = open_now.enter_context(filled(size, Path(folder) / str(size), database))
            say(f"{size} jobs")
        taken: dict[int, dict[str, list[float]]] = {size: collections.defaultdict(list) for size in sizes}
        for turn in range(rounds + 5):
            for name in timed[sizes[0]][1]:
                for size in sizes if turn % 2 else reversed(sizes):
                    http, ways = timed[size]
                    begun = time.perf_counter()
                    ways[name].get(http)
                    if turn >= 5:  # the first warm what is kept
                        taken[size][name].append(time.perf_counter() - begun)
        found = {size: {name: spread(each) for name, each in times.items()} for size, times in taken.items()}
        first, last = found[sizes[0]], found[sizes[-1]]
        grown = {name: round(last[name]["p50_ms"] / first[name]["p50_ms"], 2) for name in first}
        return {
            "database": kind_of(databases[0] if databases else None),
            "latency": found,
            "growth": grown,
            "too_much": sorted(name for name, times in grown.items() if times > MOST_GROWTH),
        }


@contextlib.contextmanager
def filled(size: int, home: Path, database: str | None) -> Iterator[tuple[Any, dict[str, Read]]]:
    """Start an API process over a database with so many jobs; yield a client and what it reads."""
    import httpx

    from holdtrue.service.settings import ServiceSettings
    from holdtrue.service.store.database import Database

    home.mkdir()
    environment = {"HOLDTRUE_LIMITS": json.dumps({"requests_per_minute": 10**9}), **over(database, home)}
    with (
        service(home, "--role", "api", **environment) as (url, secret),
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=60) as http,
        contextlib.closing(Database(database or ServiceSettings(home=home).database)) as db,
    ):
        yield http, reads(*Filler(db, make_job(http)).fill(size))


def make_job(http: Any) -> str:
    """Create a job as a customer does, cancel it, and return its id."""
    line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    form = {"files": {"file": ("a.jsonl", f"{line}\n" * 10)}, "data": {"purpose": "fine-tune"}}
    file_id = http.post("/files", **form).raise_for_status().json()["id"]
    wish = {"model": BASE, "training_file": file_id, "metadata": {"template": "yes"}}
    job = http.post("/fine_tuning/jobs", json=wish).raise_for_status().json()["id"]
    http.post(f"/fine_tuning/jobs/{job}/cancel").raise_for_status()
    return str(job)


def main() -> int:
    """Measure what the command line asks for; 1 where it is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    loaded = ways.add_parser("load")
    loaded.add_argument("--clients", type=int, default=50)
    loaded.add_argument("--seconds", type=float, default=120.0)
    loaded.add_argument("--database", help="an empty PostgreSQL database's URL; otherwise SQLite")
    grown = ways.add_parser("growth")
    grown.add_argument("--jobs", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    grown.add_argument(
        "--database", nargs="+", default=[], help="URLs of empty PostgreSQL databases, one for each size"
    )
    grown.add_argument("--rounds", type=int, default=60, help="how often each read is timed at each size")
    asked = parser.parse_args()
    if asked.way == "load":
        document = load(asked.clients, asked.seconds, asked.database)
        refused = all(kind.endswith(": 429") for kind in document["failed"])
        good = document["job_end"] == "succeeded" and document["events_whole"] and refused
    else:
        document = growth(sorted(asked.jobs), asked.database, asked.rounds)
        good = not document["too_much"]
    print(json.dumps({**document, "machine": machine(), "versions": versions()}, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
