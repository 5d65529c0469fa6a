"""Who may look: signing in and out, cookies, forged forms, roles, tenants."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import select

from holdtrue.service import auth, clock
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.schema import ApiKey, AuditEntry, GateDecision, Job, Policy, WebSession
from holdtrue.service.web.routes import BEFORE, BEHIND
from holdtrue.service.web.visitor import safe_path

from ..api.conftest import Server

OPEN = {"/", "/sign-in", "/static/{name}"}
PROVIDERS = ("/policies", "/policies/compare", "/gate")


def pages() -> list[tuple[str, str]]:
    routes = [route for router in (*BEFORE, *BEHIND) for route in router.routes]
    return sorted({(method, route.path) for route in routes for method in route.methods})  # type: ignore[attr-defined]


def filled(path: str, job_id: str = "ftjob-" + "a" * 24) -> str:
    values = {
        "fine_tuning_job_id": job_id,
        "policy_id": "policy-" + "a" * 24,
        "decision_id": "gate-" + "a" * 24,
        "key_id": "key-" + "a" * 24,
        "name": "style.css",
    }
    return path.format(**values)


@pytest.mark.parametrize(("method", "path"), pages())
def test_every_page_wants_a_session(visit, job_id: str, method: str, path: str):
    browser = visit()
    browser.http.follow_redirects = False
    answer = browser.http.request(method, filled(path, job_id))
    if path in OPEN:
        assert answer.status_code in (200, 303, 400)
        return
    assert answer.status_code == 303
    to = urlsplit(answer.headers["location"])
    assert to.path == "/sign-in"
    assert job_id not in answer.text
    bare = browser.http.request(method, filled(path, job_id), headers={"accept": "*/*"})
    assert bare.status_code == 401
    assert set(bare.json()) == {"error"}


@pytest.mark.parametrize(("method", "path"), [route for route in pages() if route[0] == "POST"])
def test_a_form_without_its_token_does_nothing(server: Server, visit, job_id: str, method: str, path: str):
    browser = visit(server.key)
    status = server.client().fine_tuning.jobs.retrieve(job_id).status
    other = visit(server.key).token("/jobs")  # of another session of the same key
    for csrf in ({}, {"csrf": ""}, {"csrf": "x" * 43}, {"csrf": other}):
        answer = browser.http.post(filled(path, job_id), data={"key": server.key, "name": "x", **csrf})
        assert answer.status_code == 403, path
    token = browser.token("/jobs")
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        answer = browser.http.post(filled(path, job_id), data={"csrf": token}, headers=headers)
        assert answer.status_code == 403
    json = browser.http.post(filled(path, job_id), json={"csrf": token})
    assert json.status_code == 400
    assert browser.get("/jobs").status_code == 200  # still signed in
    assert server.client().fine_tuning.jobs.retrieve(job_id).status == status


def test_a_session_is_a_hash_of_a_cookie_that_scripts_and_other_sites_do_not_get(server: Server, visit):
    browser = visit()
    answer = browser.http.get("/sign-in")
    token = re.findall(r'name="csrf" value="([^"]+)"', answer.text)[0]
    browser.http.follow_redirects = False
    answer = browser.http.post("/sign-in", data={"csrf": token, "key": server.key, "next": "/usage"})
    assert answer.headers["location"] == "/usage"
    cookie = next(each for each in answer.headers.get_list("set-cookie") if each.startswith("holdtrue-session="))
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    secret = cookie.partition("=")[2].partition(";")[0]
    with server.db.read() as session:
        rows = session.scalars(select(WebSession)).all()
        assert rows
        assert all(secret not in (row.digest, row.csrf) for row in rows)
        assert max(row.expires_at for row in rows) <= clock.now() + 12 * 3600
        told = session.scalars(select(AuditEntry).where(AuditEntry.action == "web.sign_in")).all()
        assert told
        assert server.key not in str([entry.detail for entry in told])
    if (file := server.home / "service.db").exists():
        assert secret.encode() not in file.read_bytes()


def test_behind_tls_cookies_are_for_tls_and_this_host_alone(tmp_path: Path):
    from starlette.testclient import TestClient

    from holdtrue.service import tenancy
    from holdtrue.service.store import migrations

    app = create_app(ServiceSettings(home=tmp_path, behind_tls=True))
    migrations.upgrade(app.state.parts.db)
    tenancy.bootstrap(app.state.parts.db)
    with TestClient(app, base_url="https://holdtrue.example") as client:
        cookie = client.get("/sign-in").headers["set-cookie"]
    app.state.parts.db.close()
    assert cookie.startswith("__Host-holdtrue-visit=")
    assert "secure" in cookie.lower()
    assert "domain" not in cookie.lower()


def test_signing_out_ends_the_session_itself(server: Server, visit):
    browser = visit(server.key)
    other = visit()
    other.http.cookies.update(browser.http.cookies)
    assert other.get("/jobs").url.path == "/jobs"
    assert browser.send("/sign-out", "/jobs").url.path == "/sign-in"
    assert browser.get("/jobs").url.path == "/sign-in"
    assert other.get("/jobs").url.path == "/sign-in"


def test_a_session_ends_with_its_time_and_with_its_key(server: Server, visit):
    key = server.tenant("leaver")
    first, second = visit(key), visit(key)
    with server.db.write() as session:
        row = session.scalars(select(ApiKey).where(ApiKey.name == "leaver")).one()
        newest = session.scalars(select(WebSession).where(WebSession.key_id == row.id)).all()
        assert len(newest) == 2
        for each in newest:
            each.expires_at = clock.now()
    assert first.get("/jobs").url.path == second.get("/jobs").url.path == "/sign-in"
    again = visit(key)
    with server.db.write() as session:
        auth.revoke(session, session.get_one(ApiKey, row.id), clock.now())
    assert again.get("/jobs").url.path == "/sign-in"
    wrong = again.send("/sign-in", "/sign-in", key=key)
    assert wrong.status_code == 403
    assert 'role="alert"' in wrong.text
    assert key not in wrong.text


def test_a_wrong_key_says_no_more_than_that(visit):
    for key in ("", "sk-wrong", "x" * 5000, "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), "<script>"):
        answer = visit().send("/sign-in", "/sign-in", key=key)
        assert answer.status_code == 403
        assert "unknown, expired or revoked" in answer.text
        assert "<script>" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/jobs\r\nx: y",
        "jobs",
        "/a b",
    ],
)
def test_nobody_is_sent_elsewhere_after_signing_in(server: Server, visit, path: str):
    assert safe_path(path) == ""
    browser = visit()
    assert browser.http.get("/sign-in", params={"next": path}).status_code == 200
    answer = browser.send("/sign-in", "/sign-in", key=server.key, next=path)
    assert answer.url.host == "127.0.0.1"
    assert answer.url.path == "/jobs"


def test_a_form_is_short(server: Server, visit):
    browser = visit(server.key)
    token = browser.token("/keys")
    assert browser.http.post("/keys", data={"csrf": token, "name": "x" * 70_000}).status_code == 413
    assert browser.http.post("/keys", data={"csrf": token, **{f"f{n}": "" for n in range(200)}}).status_code == 400


@pytest.mark.parametrize("path", ["/sign-in", "/jobs", "/nothing", "/jobs/x", "/static/style.css?v=1", "/usage"])
def test_every_page_has_the_headers_that_keep_it_safe(server: Server, visit, path: str):
    headers = visit(server.key).get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["x-frame-options"] == "DENY"
    if not path.startswith("/static"):
        assert headers["cache-control"] == "no-store"


def test_static_files_are_three_and_no_path(visit):
    browser = visit()
    for name in ("style.css", "live.js", "icon.svg"):
        assert browser.get(f"/static/{name}").status_code == 200
    for name in ("..%2f..%2fauth.py", "%2e%2e/auth.py", "style.css%00", "/etc/passwd", "base.html.j2", ""):
        assert browser.get(f"/static/{name}").status_code == 404


def test_the_api_is_as_it_was(server: Server, site: str):
    """Its errors stay JSON whatever a client accepts, and the pages are not in its document."""
    accept = {"accept": "text/html"}
    assert httpx.get(f"{site}/v1/models", headers=accept).json()["error"]["code"] is None
    bearer = {"authorization": f"Bearer {server.key}", **accept}
    assert httpx.get(f"{site}/v1/nothing", headers=bearer).json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{site}/nothing").json()["error"]["code"] == "unknown_url"
    paths = httpx.get(f"{site}/openapi.json").json()["paths"]
    assert not [path for path in paths if not path.startswith(("/v1", "/healthz", "/readyz", "/metrics"))]
    # A key is not a session, and a session is no key.
    assert httpx.get(f"{site}/jobs", headers={"authorization": f"Bearer {server.key}"}).status_code == 401


def test_a_strangers_job_is_not_there(server: Server, visit, job_id: str):
    stranger = visit(server.tenant("web-stranger"))
    assert job_id not in stranger.get("/jobs").text
    absent = "ftjob-" + "0" * 24
    for path in ("", "/events", "/live", "/receipt", "/card"):
        theirs, nothing = (stranger.get(f"/jobs/{each}{path}") for each in (job_id, absent))
        assert theirs.status_code == nothing.status_code == 404
        assert _plain(theirs.text) == _plain(nothing.text).replace(absent, job_id)
    for action in ("cancel", "pause", "resume"):
        assert stranger.send(f"/jobs/{job_id}/{action}", "/jobs").status_code == 404
    assert stranger.get("/jobs", params={"after": job_id}).status_code == 404
    with server.db.read() as session:
        own, project = session.execute(select(ApiKey.id, ApiKey.project_id).order_by(ApiKey.created_at)).first()  # type: ignore[misc]
    assert stranger.get("/keys", params={"project": project}).status_code == 404
    assert stranger.send("/keys", "/keys", name="x", project=project).status_code == 404
    assert stranger.send(f"/keys/{own}/revoke", "/keys").status_code == 404


def _plain(text: str) -> str:
    return re.sub(r"req-\w+|csrf\" value=\"[^\"]+", "", text)


def test_the_providers_pages_are_not_there_for_others(server: Server, visit, job_id: str):
    admin = visit(server.tenant("web-admin"))
    with server.db.write() as session:
        policy = session.scalars(select(Policy)).first()
        assert policy is not None
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        decision = GateDecision(
            id="gate-" + "b" * 24, job_id=job.id, attempt=0, step_number=0, outcome="fail", report={}, adapter="a",
            adapter_digest="0" * 64, action="block", created_at=1,
        )  # fmt: skip
        session.add(decision)
    paths = [*PROVIDERS, f"/policies/{policy.id}", f"/gate/{decision.id}"]
    for path in paths:
        assert admin.get(path).status_code == 404, path
    assert not any(f'href="{path}"' in admin.get("/jobs").text for path in PROVIDERS)
    assert admin.send(f"/policies/{policy.id}/activate", "/jobs", instead_of=policy.id).status_code == 404
    said = {"by": "Mallory", "reason": "because I want it", "decision": "release"}
    assert admin.send(f"/gate/{decision.id}", "/jobs", **said).status_code == 404
    with server.db.write() as session:
        row = session.get_one(GateDecision, decision.id)
        assert row.override is None
        session.delete(row)


def test_a_key_sees_what_its_scopes_allow(server: Server, visit, job_id: str):
    with server.db.write() as session:
        project = session.scalars(select(Job.project_id).where(Job.id == job_id)).one()
        made = [
            auth.create(session, project_id=project, name="narrow", scopes=scopes, now=clock.now()).secret
            for scopes in (["fine_tuning.read"], ["models.read"])
        ]
    reader, other = visit(made[0]), visit()
    page = reader.get(f"/jobs/{job_id}").text
    assert "Cancel the job" not in page
    assert reader.send(f"/jobs/{job_id}/cancel", "/jobs").status_code == 403
    assert reader.get("/keys").status_code == 403
    assert reader.get("/usage").status_code == 403
    other.send("/sign-in", "/sign-in", key=made[1])
    assert other.get("/jobs").status_code == 403
    assert other.get("/usage").status_code == 200


def test_pages_count_as_requests(server: Server, visit):
    browser = visit(server.tenant("hurried", requests_per_minute=5))
    answers = [browser.get("/jobs") for _ in range(8)]
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) > 0
    assert "<h1>Too many requests</h1>" in answers[-1].text


def test_a_provider_sees_keys_where_there_are_several_projects(server: Server, visit):
    for slug in ("one-more", "and-another"):
        server.tenant(slug)
    page = visit(server.key).http.get("/keys")
    assert page.status_code == 200
    for slug in ("one-more", "and-another"):
        assert slug in page.text
