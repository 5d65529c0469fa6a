from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ..api.conftest import BASE, ROW, Server, start, stop

CHROMIUM = Path("/usr/bin/chromium")
HTML = {"accept": "text/html,application/xhtml+xml"}


@dataclass
class Browserless:
    """A browser without JavaScript, as far as HTTP goes: cookies, forms, redirects."""

    http: httpx.Client

    def get(self, path: str, **more) -> httpx.Response:
        return self.http.get(path, **more)

    def token(self, path: str) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.get(path).text)
        assert found, path
        return found[1]

    def send(self, path: str, page: str, **fields) -> httpx.Response:
        """Send a form as it stands on a page."""
        return self.http.post(path, data={"csrf": self.token(page), **fields})

    def sign_in(self, key: str) -> Browserless:
        answer = self.send("/sign-in", "/sign-in", key=key)
        assert answer.url.path == "/jobs", answer.text
        return self


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with contextlib.ExitStack() as held:
        more = {}
        if request.param == "postgresql":
            more["HOLDTRUE_DATABASE_URL"] = held.enter_context(request.getfixturevalue("postgres").database())
        found = start(tmp_path_factory.mktemp("web") / "home", **more)
        yield found
        stop(found)


@pytest.fixture(scope="session")
def site(server: Server) -> str:
    return server.url.removesuffix("/v1")


@pytest.fixture
def visit(site: str) -> Iterator:
    """Make browsers, each with cookies of its own, signed in where a key is given."""
    opened: list[httpx.Client] = []

    def make(key: str | None = None) -> Browserless:
        http = httpx.Client(base_url=site, headers=HTML, follow_redirects=True, timeout=30)
        opened.append(http)
        return Browserless(http).sign_in(key) if key else Browserless(http)

    yield make
    for http in opened:
        http.close()


@pytest.fixture(scope="session")
def job_id(server: Server) -> str:
    with server.client() as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        return client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="mine").id


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """The installed browser; pages are tested in it, and not in one that is downloaded.

    While it is held, an event loop runs in the main thread: it ends before others need one.
    """
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab_of(chromium) -> Iterator:
    """Open pages of a server; an error or warning on the console, a breach of the pages' policy above all, fails."""
    contexts = []
    complaints: list[str] = []

    def complain(message) -> None:
        refused = "status of 40" in message.text and "/static/" not in message.location["url"]  # a page, on purpose
        if message.type in ("error", "warning") and not refused:
            complaints.append(message.text)

    def make(server: Server, key: str | None = "", **options):
        context = chromium.new_context(base_url=server.url.removesuffix("/v1"), **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))
        if key is not None:
            page.goto("/sign-in")
            page.get_by_label("API key").fill(key or server.key)
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url("**/jobs")
        return page

    yield make
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def tab(tab_of, server: Server):
    """Open pages of the shared server, signed in where a key is given."""
    return lambda key=None, **options: tab_of(server, key, **options)
