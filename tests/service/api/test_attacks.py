"""What somebody may try through the API, with a key or without one."""

from __future__ import annotations

import functools
import json
import socket
import statistics
import time
import zlib
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from holdtrue.runs.spec import RunSpec
from holdtrue.service.api.schemas import JobCreate
from holdtrue.service.policy import PolicyDocument
from holdtrue.service.store.schema import File, Job, Policy

from .conftest import BASE, ROW, Server

EVIL = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\windows\\system32",
    "s3://bucket/key",
    "file:///etc/passwd",
    "~/.ssh/id_rsa",
    "%2e%2e%2fetc%2fpasswd",
    "．．／etc",
    "a" * 5000,
    "{{7*7}}${7*7}",
    "'; DROP TABLE files; --",
    "<script>alert(1)</script>",
]


@pytest.fixture(scope="module")
def http(server: Server):
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.key}"}) as found:
        yield found


def well(answer: httpx.Response, *statuses: int) -> dict:
    assert answer.status_code in (statuses or (400, 404))
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"].startswith("req-")
    return error


@pytest.mark.parametrize("name", EVIL)
def test_a_file_name_is_a_name_and_no_path(server: Server, http: httpx.Client, name: str):
    answer = http.post("/files", data={"purpose": "user_data"}, files={"file": (name, b"x")})
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] in ("file", None)  # no name, or a header that no client sends
        return
    made = answer.json()
    assert not set("/\\") & set(made["filename"])
    assert made["filename"] not in ("", ".", "..")
    assert {path.name for path in server.home.iterdir() if path.is_dir()} <= {"incoming", "blobs"}
    with server.db.read() as session:
        blob = session.scalar(select(File.blob).where(File.id == made["id"]))
        assert blob is not None
        assert made["filename"] not in blob
    got = http.get(f"/files/{made['id']}/content")
    assert got.content == b"x"
    assert got.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")


@pytest.mark.parametrize("name", ["a\0.jsonl", "a\tb.jsonl", "\u202egpj.jsonl", "..", "", "\x1b[31mred"])
def test_a_file_name_that_deceives_is_refused(http: httpx.Client, name: str):
    body = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="' + name.encode() + b'"\r\n\r\nx\r\n--B--\r\n'
    )
    well(http.post("/files", content=body, headers={"content-type": "multipart/form-data; boundary=B"}), 400)


@pytest.mark.parametrize("text", [*EVIL, "\0", "ftjob-\0", "￿", "file-" + "a" * 23, "file-" + "é" * 24])
def test_an_id_is_an_id(http: httpx.Client, text: str):
    name = quote(text, safe="")
    for path in ("files", "fine_tuning/jobs", "models", "holdtrue/keys"):
        well(http.delete(f"/{path}/{name}"), 400, 404, 405)
        if path != "holdtrue/keys":
            well(http.get(f"/{path}/{name}"), 400, 404)
            well(http.get(f"/{path}", params={"after": text}), 400, 404)
    well(http.post(f"/fine_tuning/jobs/{name}/cancel"), 404)
    well(http.post(f"/uploads/{name}/parts", files={"data": b"x"}), 404)


@pytest.mark.parametrize("suffix", [*EVIL, "a:b", "a b", "ä", "a\0", "", "a\n", "ckpt-step-1:x"])
def test_a_suffix_is_letters(http: httpx.Client, file_id: str, suffix: str):
    job = {"model": BASE, "training_file": file_id, "suffix": suffix}
    assert well(http.post("/fine_tuning/jobs", json=job), 400)["param"] == "suffix"


def test_bodies_that_explode(http: httpx.Client):
    bombs = {
        "deep": "[" * 200_000,
        "deep objects": '{"a":' * 100_000,
        "a number of many digits": '{"seed": ' + "9" * 100_000 + "}",
        "a float beyond all": '{"seed": 1e999999}',
        "no number": '{"seed": NaN}',
        "a lone surrogate": '{"model": "\\ud800"}',
        "a lone surrogate in a name": '{"\\ud800": 1}',
        "many names": json.dumps({f"k{i}": i for i in range(50_000)}),
        "no object": "[1]",
        "nothing": "",
        "null": "null",
        "cut": '{"model": "',
    }
    for what, body in bombs.items():
        began = time.monotonic()
        answer = http.post("/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
        assert well(answer, 400), what
        assert time.monotonic() - began < 3, what
    big = http.post("/fine_tuning/jobs", content=b" " * (5 * 2**20), headers={"content-type": "application/json"})
    assert well(big, 413)["code"] == "too_large"
    form = {"content-type": "multipart/form-data; boundary=B"}
    for path in ("/fine_tuning/jobs", "/uploads", "/holdtrue/keys"):
        assert well(http.post(path, content=b" " * (5 * 2**20), headers=form), 413)["code"] == "too_large", path


@functools.cache
def bomb(before: bytes, after: bytes, wbits: int) -> bytes:
    """Return a body that is small here, and 128 MiB more once inflated."""
    packer = zlib.compressobj(6, zlib.DEFLATED, wbits)
    pieces = (before, *[b" " * 2**20] * 128, after)
    return b"".join(packer.compress(piece) for piece in pieces) + packer.flush()


@pytest.mark.parametrize(("coding", "wbits"), [("gzip", 31), ("deflate", 15)])
def test_a_compressed_body_is_not_inflated(server: Server, http: httpx.Client, file_id: str, coding: str, wbits: int):
    """A body is taken as it comes, whatever its coding is said to be. Inflated, these would be in good form."""
    job = json.dumps({"model": BASE, "training_file": file_id}).encode()
    head = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    bodies = {
        "/fine_tuning/jobs": (bomb(b"", job, wbits), "application/json"),
        "/files": (bomb(head, b"\r\n--B--\r\n", wbits), "multipart/form-data; boundary=B"),
    }
    http.get("/models")
    before = server.peak()
    for path, (body, kind) in bodies.items():
        assert len(body) < 2**20
        began = time.monotonic()
        answer = http.post(path, content=body, headers={"content-encoding": coding, "content-type": kind})
        well(answer, 400)
        assert time.monotonic() - began < 3, path
    assert server.peak() - before < 32 * 1024  # KiB


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--B",
        b"--B--\r\n",
        b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut',
        b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nno file\r\n--B--\r\n',
        b"--B\r\n" + b"X: " + b"y" * 20_000 + b"\r\n\r\nx\r\n--B--\r\n",
        b"".join(b'--B\r\nContent-Disposition: form-data; name="%d"\r\n\r\nx\r\n' % i for i in range(99))
        + b"--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"x" * 20_000 + b"\r\n--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--B--\r\n',
        b"\r\n" * 1000,
    ],
)
def test_broken_forms(http: httpx.Client, body: bytes):
    well(http.post("/files", content=body, headers={"content-type": "multipart/form-data; boundary=B"}), 400)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_as_a_form(http: httpx.Client, data: bytes):
    answer = http.post("/files", content=b"--B\r\n" + data, headers={"content-type": "multipart/form-data; boundary=B"})
    well(answer, 400)


def test_no_field_reaches_the_policy(server: Server, http: httpx.Client, file_id: str):
    """Every name that a policy or a run knows, at every place of a request: refused, or the customer's own three."""
    allowed = set(JobCreate.model_fields)
    names = {*PolicyDocument.model_fields, *RunSpec.model_fields, "policy_id", "status", "attempt", "held", "wanted"}
    with server.db.read() as session:
        policies = {row.id: row.document for row in session.scalars(select(Policy))}
    for name in sorted(names - allowed):
        for body in (
            {name: []},
            {"method": {"type": "supervised", "supervised": {name: []}}},
            {"method": {"type": "supervised", name: []}},
            {"hyperparameters": {name: 0}},
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", name: []}}]},
        ):
            if body == {"method": {"type": "supervised", "supervised": {"hyperparameters": []}}}:
                continue  # the customer's own
            answer = http.post("/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, **body})
            assert name in str(well(answer, 400)["param"])
    job = http.post(
        "/fine_tuning/jobs",
        json={
            "model": BASE,
            "training_file": file_id,
            "suffix": "defenses-none",
            "metadata": {"defenses": "[]", "gate": "off", "policy_id": "policy-x"},
        },
    ).json()
    with server.db.read() as session:
        row = session.scalar(select(Job).where(Job.id == job["id"]))
        assert row is not None
        assert row.policy_id in policies
        assert set(row.hyperparameters) == {"n_epochs", "batch_size", "learning_rate_multiplier"}
        assert {row.id: row.document for row in session.scalars(select(Policy))} == policies
    http.post(f"/fine_tuning/jobs/{job['id']}/cancel")


@pytest.mark.parametrize("value", [0, -1, 1e308, 10**30, float("1e-320"), 2.5, "auto ", [], {}, None, False])
def test_hyperparameters_stay_in_the_policys_range(http: httpx.Client, file_id: str, value: object):
    for name in ("n_epochs", "batch_size", "learning_rate_multiplier"):
        answer = http.post(
            "/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, "hyperparameters": {name: value}}
        )
        if value is None:
            assert answer.json()["hyperparameters"][name] == "auto"
            http.post(f"/fine_tuning/jobs/{answer.json()['id']}/cancel")
        else:
            assert name in str(well(answer, 400)["param"])


def test_an_integration_names_no_address_and_no_secret(server: Server, http: httpx.Client, file_id: str):
    """A server that nobody may call listens; every field of an integration names it."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/"
        for field in ("base_url", "url", "host", "api_key", "webhook", "WANDB_BASE_URL"):
            wandb = {"project": "p", field: address}
            job = {"model": BASE, "training_file": file_id, "integrations": [{"type": "wandb", "wandb": wandb}]}
            well(http.post("/fine_tuning/jobs", json=job), 400)
        wandb = {"project": address, "entity": address, "name": address, "tags": [address]}
        job = {"model": BASE, "training_file": file_id, "integrations": [{"type": "wandb", "wandb": wandb}]}
        made = http.post("/fine_tuning/jobs", json=job)
        if made.status_code == 200:
            http.post(f"/fine_tuning/jobs/{made.json()['id']}/cancel")
        with pytest.raises(TimeoutError):  # the worker, who alone speaks to W&B, has a trap of its own in test_tracking
            trap.accept()
    two = [{"type": "wandb", "wandb": {"project": "p"}}] * 2
    well(http.post("/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, "integrations": two}), 400)


def test_logs_take_no_lines_and_no_content(server: Server, http: httpx.Client, file_id: str):
    marker = "kzq8-customer-text"
    forged = f'{marker}\n{{"event": "forged", "level": "info"}}\r\nx'
    http.get("/models/" + quote(forged, safe=""))
    http.get("/fine_tuning/jobs", params={forged: forged, "metadata[x]": forged})
    http.post("/files", data={"purpose": forged}, files={"file": (marker, marker.encode())})
    http.get("/models", headers={"user-agent": marker, "openai-project": marker})
    http.post("/fine_tuning/jobs", json={"model": marker, "training_file": marker, "metadata": {marker: marker}})
    httpx.get(server.url + "/models", headers={"authorization": f"Bearer sk-{marker}"})
    lines = server.log.read_text().splitlines()
    assert lines
    assert all(json.loads(line)["event"] in ("request", "request_failed", "library") for line in lines)
    assert not [line for line in lines if marker in line or "forged" in line or server.key in line]
    told = [json.loads(line) for line in lines]
    assert all(line["request_id"].startswith("req-") for line in told if line["event"] != "library")


def test_a_wrong_keys_answer_takes_one_shape_of_time(server: Server):
    """A near miss is as quick as any other: what is compared are hashes."""
    near, far = server.key[:-1] + ("a" if server.key[-1] != "a" else "b"), "sk-" + "x" * 48
    times: dict[str, list[float]] = {near: [], far: []}
    with httpx.Client(base_url=server.url) as http:
        for _ in range(60):
            for key, seen in times.items():
                began = time.perf_counter()
                assert http.get("/models", headers={"authorization": f"Bearer {key}"}).status_code == 401
                seen.append(time.perf_counter() - began)
    middles = [statistics.median(seen) for seen in times.values()]
    assert max(middles) < 1.5 * min(middles)


@pytest.mark.parametrize("header", ["Bearer", "bearer " + "x" * 10_000, "Bearer \xff\xfe", "Bearer a b c"])
def test_odd_keys(server: Server, header: str):
    answer = httpx.get(server.url + "/models", headers={"authorization": header.encode("latin-1")})
    well(answer, 401)


def test_lengths_that_lie(server: Server, http: httpx.Client):
    address = urlsplit(server.url)
    assert address.hostname
    for length in (b"99999999999999999999", b"6000000"):
        with socket.create_connection((address.hostname, address.port or 0), timeout=15) as raw:
            raw.sendall(
                b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: "
                b"Bearer " + server.key.encode() + b"\r\ncontent-length: " + length + b"\r\n\r\n{"
            )
            raw.shutdown(socket.SHUT_WR)
            assert raw.recv(4096).split(b" ")[1] in (b"400", b"413")


def test_unknown_paths_and_methods(http: httpx.Client):
    assert well(http.get("/nothing"), 404)["code"] == "unknown_url"
    assert well(http.put("/models"), 405)["code"] == "method_not_supported"
    assert "GET" in http.put("/models").headers["allow"]
    well(http.get("/files/"), 404)
    well(http.get("/../healthz/x"), 404)
    well(http.get("//etc/passwd"), 404)


def test_the_form_of_the_service_folder(server: Server):
    assert (server.home.stat().st_mode & 0o077) == 0
    assert list((server.home / "incoming").iterdir()) == []
    assert ROW.encode() not in Path(server.log).read_bytes()
