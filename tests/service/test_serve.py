"""``holdtrue serve``: the first key, the address, the processes, and their end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from holdtrue.cli.main import main
from holdtrue.errors import RunError, SpecError
from holdtrue.service import tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.evidence import signing
from holdtrue.service.serve import check_exposure, environment, listen
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Project
from holdtrue.service.supervisor import Child, Supervisor


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of `serve` that name each database."""
    if request.param == "sqlite":
        return []
    signing.make_key(tmp_path / "signing-key.pem")
    monkeypatch.setenv("HOLDTRUE_SIGNING_KEY", str(tmp_path / "signing-key.pem"))
    return ["--database-url", request.getfixturevalue("postgres_url")]


def test_one_command_prints_one_key_once_into_a_file(tmp_path: Path, database: list[str]):
    """Twice from the same folder, stdout a file: the key is in the first one's only, and works in both."""
    keys, urls = [], []
    for number in range(2):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "holdtrue.cli.main",
                "serve",
                "--role",
                "api",
                "--port",
                "0",
                "--home",
                tmp_path / "h",
                *database,
            ],
            stdout=out.open("wb"),
            stderr=subprocess.DEVNULL,
        )
        try:
            until(lambda out=out: b"/v1\n" in out.read_bytes())
            until(lambda out=out, number=number: number or b"sk-" in out.read_bytes())
            lines = out.read_text().splitlines()
            urls.append(lines[0].removeprefix("holdtrue serves "))
            keys += [line.rpartition(" ")[2] for line in lines[1:]]
            answer = httpx.get(urls[-1] + "/models", headers={"authorization": f"Bearer {keys[0]}"}, timeout=30)
            assert answer.status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert len(keys) == 1
    assert len(keys[0]) == 51


@pytest.mark.parametrize("role", ["dispatcher", "worker"])
def test_a_role_that_starts_first_leaves_the_key_to_one_that_prints_it(tmp_path: Path, role: str):
    def start(role: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "holdtrue.cli.main", "serve", "--role", role, "--home", tmp_path / "h"]
        return subprocess.Popen([*command, *options], stdout=(tmp_path / role).open("wb"), stderr=subprocess.DEVNULL)

    def ready() -> bool:
        if not (tmp_path / "h" / "service.db").exists():
            return False
        with sqlite3.connect(tmp_path / "h" / "service.db") as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE name = 'alembic_version'").fetchall()
        return bool(tables) and (tmp_path / "h" / "blobs").exists()

    first, api = start(role), None
    try:
        until(ready, 120)
        api = start("api", "--port", "0")
        until(lambda: b"sk-" in (tmp_path / "api").read_bytes(), 120)
        assert b"sk-" not in (tmp_path / role).read_bytes()
    finally:
        for process in (first, api):
            if process is not None:
                process.kill()
                process.wait()


def test_an_open_address_wants_a_word_on_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--host", "0.0.0.0", "--home", str(tmp_path)]) == 2
    assert "--behind-tls" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    check_exposure(ServiceSettings(host="0.0.0.0", behind_tls=True))
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(ServiceSettings(host=host))
    for host in ("", "10.0.0.1", "::", "example.org"):
        with pytest.raises(SpecError):
            check_exposure(ServiceSettings(host=host))


NOWHERE = "postgresql://holdtrue@127.0.0.1:1/holdtrue"
"""A database that other hosts could share; nobody listens there, and nothing may get as far as asking."""


@pytest.mark.parametrize("role", ["all", "api", "worker"])
def test_who_signs_over_a_database_of_several_hosts_needs_the_key_of_all(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    serve = ["serve", "--role", role, "--home", str(tmp_path / "home"), "--database-url", NOWHERE]
    assert main(serve) == 2
    said = capsys.readouterr().err
    assert "HOLDTRUE_SIGNING_KEY" in said
    assert "holdtrue verify" in said
    monkeypatch.setenv("HOLDTRUE_SIGNING_KEY", str(tmp_path / "typo.pem"))
    assert main(serve) == 2
    assert "typo.pem" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_host_makes_a_key_of_its_own_over_sqlite_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def at(name: str, **values: object) -> ServiceSettings:
        return ServiceSettings(home=tmp_path / name, **values)  # type: ignore[arg-type]

    with pytest.raises(SpecError, match="own"):
        signing.signer_of(at("one", database_url=NOWHERE))
    assert not (tmp_path / "one").exists()
    alone = signing.signer_of(at("two"))
    here = signing.signer_of(at("three", database_url=NOWHERE, signing_key=tmp_path / "two" / signing.HOME_KEY))
    assert signing.public_pem(here) == signing.public_pem(alone)
    monkeypatch.setenv(signing.VARIABLE, (tmp_path / "two" / signing.HOME_KEY).read_text())
    assert signing.public_pem(signing.signer_of(at("four", database_url=NOWHERE))) == signing.public_pem(alone)
    assert not (tmp_path / "four").exists()


def test_a_key_that_openssl_makes_signs(tmp_path: Path):
    """As the docs tell a provider to make it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key = tmp_path / "signing-key.pem"
    subprocess.run([openssl, "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    public = subprocess.run([openssl, "pkey", "-in", key, "-pubout"], check=True, capture_output=True).stdout
    envelope = signing.sign({"a": 1}, signing.load_signer(key))
    assert signing.verify(envelope, public) == {"a": 1}


def test_a_taken_port_is_said_before_a_key_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(RunError, match="--port"):
            listen("127.0.0.1", port)
        assert main(["serve", "--port", str(port), "--home", str(tmp_path)]) == 1
    assert "sk-" not in capsys.readouterr().out
    assert not (tmp_path / "service.db").exists()


def test_a_store_without_its_disk_is_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    settings = ServiceSettings(home=tmp_path / "h")
    app = create_app(settings)
    migrations.upgrade(app.state.parts.db)
    key = tenancy.bootstrap(app.state.parts.db).key
    client = TestClient(app, headers={"authorization": f"Bearer {key}"})
    assert client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", b"x")}).status_code == 200
    app.state.parts.db.close()
    (tmp_path / "h" / "blobs").rename(tmp_path / "disk")
    for role in ("all", "api", "dispatcher", "worker"):
        assert main(["serve", "--role", role, "--port", "0", "--home", str(tmp_path / "h")]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "names 1 files and folders" in said
        assert "mount its disk" in said
    empty = tmp_path / "h" / "blobs"
    empty.rename(tmp_path / "empty")
    (tmp_path / "disk").rename(empty)
    monkeypatch.setattr("holdtrue.service.serve._supervise", lambda *_: None)
    assert main(["serve", "--port", "0", "--home", str(tmp_path / "h")]) == 0
    # Lost for good, and given up.
    empty.rename(tmp_path / "disk")
    with contextlib.closing(Database(settings.database)) as db, db.read() as session:
        project = session.scalars(select(Project.id)).one()
    assert main(["projects", "erase", project, "--yes", "--home", str(tmp_path / "h")]) == 0
    assert main(["serve", "--port", "0", "--home", str(tmp_path / "h")]) == 0


def test_bad_settings_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert main(["serve", "--role", "boss"]) == 2
    monkeypatch.setenv("HOLDTRUE_UPLOAD_BYTES", "many")
    assert main(["serve"]) == 2
    assert "HOLDTRUE_UPLOAD_BYTES" in capsys.readouterr().err


def test_settings_survive_the_way_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = ServiceSettings(
        home=tmp_path,
        port=7,
        behind_tls=True,
        inference_secret="s",
        limits={"jobs_active": 3},
        signing_key=tmp_path / "k",
    )
    for name, value in environment(made).items():
        monkeypatch.setenv(name, value)
    assert ServiceSettings() == made


def test_the_supervisor_starts_again_what_dies_and_stops_what_lives(tmp_path: Path):
    script = (
        "import os, signal, sys, time\n"
        "open(sys.argv[1], 'a').write(f'{os.getpid()}\\n')\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + '.end', 'a').write('x'), sys.exit(0)))\n"
        "time.sleep(600)\n"
    )
    note = tmp_path / "pids"
    child = Child("toy", [sys.executable, "-c", script, str(note)])
    stop = threading.Event()
    thread = threading.Thread(target=Supervisor([child], {}).run, args=(stop,), daemon=True)
    thread.start()

    def pids() -> list[int]:
        return [int(line) for line in note.read_text().splitlines()] if note.exists() else []

    until(lambda: len(pids()) == 1)
    os.kill(pids()[0], signal.SIGKILL)
    until(lambda: len(pids()) == 2)
    assert child.deaths == 1
    time.sleep(0.2)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert (tmp_path / "pids.end").read_text() == "x"
    with pytest.raises(ProcessLookupError):
        os.kill(pids()[1], 0)


def test_a_child_ends_with_its_supervisor(tmp_path: Path):
    """The supervisor is killed and can say nothing; the end of its pipe does."""
    child = (
        "import os, sys, time\n"
        "from holdtrue.service.supervisor import watch_lifeline\n"
        "watch_lifeline(int(sys.argv[-1]))\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '\\n')\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import sys, threading\n"
        "from holdtrue.service.supervisor import Child, Supervisor\n"
        f"Supervisor([Child('toy', [sys.executable, '-c', {child!r}])], {{}}).run(threading.Event())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    until(gone)


def test_an_answer_does_not_wait_for_the_clients_word():
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_is_kept_over_a_restart_of_the_api():
    """The supervisor holds the socket: a connection that comes while nobody accepts waits, and is not refused."""
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname(), timeout=2):
        pass


STATEMENT = {
    "subject": [{"name": "ft:m", "digest": {"sha256": "ab" * 32}}],
    "predicate": {
        "job": {"id": "ftjob-x", "parent": None},
        "policy": {"base_model": "smollm2-135m-instruct", "version": 1},
        "base": {"name": "smollm2-135m-instruct", "revision": "main"},
        "data": {"train": {"rows": 12, "trained_tokens": 90, "sha256": "ab" * 32}},
        "training": {"steps": 4},
        "defenses": [{"name": "kl", "term": None}],
        "scorecard": {"kl": {"value": 0.1}},
        "gate": {"outcome": "pass", "decisions": []},
        "override": None,
    },
}
PAGES = f"""
import json, re, sys, tempfile
from pathlib import Path
from starlette.testclient import TestClient
from holdtrue.service import serve, supervisor, tenancy
from holdtrue.service.api.app import create_app
from holdtrue.service.evidence import signing
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.schema import GateDecision, Receipt

settings = ServiceSettings(home=Path(tempfile.mkdtemp()))
app = create_app(settings)
db = app.state.parts.db
migrations.upgrade(db)
key = tenancy.bootstrap(db).key
client = TestClient(app, headers={{'authorization': f'Bearer {{key}}'}})
file = client.post('/v1/files', data={{'purpose': 'fine-tune'}}, files={{'file': ('a', b'x')}}).json()['id']
job = client.post('/v1/fine_tuning/jobs', json={{'model': 'smollm2-135m-instruct', 'training_file': file}}).json()['id']
common = {{'job_id': job, 'adapter_digest': 'ab' * 32, 'created_at': 1}}
decision = {{'attempt': 0, 'outcome': 'pass', 'report': {{}}, 'adapter': 'a', 'action': 'release'}}
with db.write() as session:
    envelope = signing.sign({STATEMENT!r}, signing.signer_of(settings))
    session.add(Receipt(id='receipt-' + 'a' * 24, envelope=envelope, **common))
    session.add(GateDecision(id='gate-' + 'a' * 24, **decision, **common))
browser = TestClient(app, headers={{'accept': 'text/html'}})
token = re.findall('name="csrf" value="([^"]+)"', browser.get('/sign-in').text)[0]
assert browser.post('/sign-in', data={{'csrf': token, 'key': key}}).status_code == 200
policy = re.findall('/policies/(policy-[^"/?]+)"', browser.get('/policies').text)[0]
paths = ['', '/events', '/receipt', '/card']
paths = ['/jobs', *(f'/jobs/{{job}}{{path}}' for path in paths), '/usage', '/keys', '/gate', f'/gate/gate-{{"a" * 24}}']
for path in [*paths, f'/policies/{{policy}}', f'/v1/holdtrue/jobs/{{job}}/card']:
    answer = client.get(path) if path.startswith('/v1') else browser.get(path)
    assert answer.status_code == 200, (path, answer.text)
heavy = ('torch', 'transformers', 'peft', 'datasets', 'accelerate', 'sklearn')
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_the_api_process_has_no_torch():
    """Whatever it was asked for: files and jobs, every page, a receipt and a model card."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
