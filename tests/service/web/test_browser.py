"""The pages in the installed Chromium: live, by keyboard, without JavaScript, under their own policy."""

from __future__ import annotations

import re
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ..api.conftest import BASE, ROW, Server
from . import trained

RULES = Path(__file__).with_name("rules.js").read_text(encoding="utf-8")


def new_job(server: Server, key: str | None = None, **more: Any) -> str:
    with server.client(key) as client:
        file = client.files.create(file=("train.jsonl", (ROW * 12).encode()), purpose="fine-tune").id
        return client.fine_tuning.jobs.create(model=BASE, training_file=file, **more).id


@pytest.fixture(scope="module")
def finished(server: Server) -> dict[str, str]:
    """A job that has ended with all there is to show, and one that a person has to decide on."""
    done, held = new_job(server, suffix="done", metadata={"team": "blue"}), new_job(server, suffix="held")
    for number in range(1, 13):
        trained.step(server, done, number)
    trained.decided(server, done, "release")
    trained.move(server, done, status="succeeded")
    return {"done": done, "held": held, "decision": trained.decided(server, held, "hold")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_sound_for_screen_readers_and_eyes(server: Server, tab, finished: dict[str, str], scheme: str):
    out = tab(color_scheme=scheme)
    out.goto("/sign-in")
    assert out.evaluate(RULES) == []
    page = tab(server.key, color_scheme=scheme)
    policy = "/policies"
    page.goto(policy)
    version = page.get_by_role("link", name="Version 1").first.get_attribute("href")
    own = [f"/jobs/{finished['done']}", f"/jobs/{finished['held']}", f"/jobs/{finished['done']}/events"]
    for path in ("/jobs", *own, "/usage", "/keys", policy, version, "/gate", f"/gate/{finished['decision']}"):
        page.goto(path)
        while page.locator("details:not([open]) > summary").count():
            page.locator("details:not([open]) > summary").first.click()
        assert page.evaluate(RULES) == [], path


def test_the_curves_are_drawn_with_their_axes(server: Server, tab, finished: dict[str, str]):
    page = tab(server.key)
    page.goto(f"/jobs/{finished['done']}")
    loss, kl = (page.locator("figure svg").nth(index) for index in range(2))
    assert "training rows 1.08" in loss.get_attribute("aria-label")
    assert "held-out rows 1.5" in loss.get_attribute("aria-label")
    for chart, count in ((loss, 1), (kl, 1)):
        assert chart.locator("path.series").count() == count
        assert chart.locator("text").count() >= 5
    path = loss.locator("path.series.one").get_attribute("d")
    points = [tuple(float(value) for value in each.split()) for each in re.split("[ML]", path) if each]
    assert len(points) == 12
    assert all(before[0] < after[0] for before, after in pairwise(points))
    assert all(before[1] < after[1] for before, after in pairwise(points))  # it falls: y grows


def test_a_job_is_followed_while_it_runs(server: Server, tab):
    job_id = new_job(server)
    page = tab(server.key)
    page.goto(f"/jobs/{job_id}")
    assert page.locator("#no-points").is_visible()
    page.evaluate("window.loadedOnce = true")
    with page.expect_response(lambda answer: answer.url.endswith(job_id)):
        trained.move(server, job_id, status="running", stage="train")
    page.locator("#announce", has_text="Now running, stage train.").wait_for()
    page.locator("li[aria-current=step]", has_text="Train").wait_for()
    trained.tell(server, job_id, "Checkpoint created")
    page.locator("#events", has_text="Checkpoint created").wait_for()
    trained.move(server, job_id, stage="finalise")
    page.locator("li[aria-current=step]", has_text="Finish").wait_for()
    for number in range(1, 4):
        trained.step(server, job_id, number)
    trained.tell(server, job_id, "Halfway <b>there</b>")
    page.locator("#events", has_text="Halfway <b>there</b>").wait_for()
    assert page.locator("#events b").count() == 0
    page.locator("figure svg path.series.one").first.wait_for()
    assert page.locator("#points tbody tr").count() == 3
    assert not page.locator("#no-points").is_visible()
    trained.step(server, job_id, 1, attempt=1)
    page.locator("#points tbody tr").nth(1).wait_for(state="detached")
    trained.decided(server, job_id, "release")
    page.get_by_text("It fell too far.").wait_for()
    trained.move(server, job_id, status="succeeded", held=False)
    page.locator("#state", has_text="succeeded").wait_for()
    assert page.evaluate("window.loadedOnce")  # all without loading the page again
    assert "succeeded" in page.title()
    assert page.evaluate(RULES) == []


def test_what_is_being_done_is_not_disturbed_by_an_update(server: Server, tab):
    job_id = new_job(server)
    trained.move(server, job_id, status="running", stage="prepare")
    page = tab(server.key)
    page.goto(f"/jobs/{job_id}")
    page.get_by_text("Cancel the job…").click()
    page.locator("#pause").focus()
    trained.move(server, job_id, stage="train")
    page.locator("li[aria-current=step]", has_text="Train").wait_for()
    assert page.evaluate("document.activeElement.id") == "pause"
    page.get_by_role("button", name="Cancel the job for good").click()
    page.get_by_text("The job was asked to cancel.").wait_for()
    assert server.client().fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_no_event_is_told_twice_or_lost_over_a_broken_line(server: Server, tab):
    job_id = new_job(server)
    page = tab(server.key)
    page.goto(f"/jobs/{job_id}")
    stop = threading.Event()

    def talk() -> None:
        for number in range(30):
            trained.tell(server, job_id, f"told {number:02d}")
            stop.wait(0.05)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    page.locator("#events", has_text="told 05").wait_for()
    for _ in range(2):  # what a browser does in a tab that is put aside and looked at again
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        page.evaluate("Object.defineProperty(document, 'hidden', {value: false, configurable: true});"
                      "document.dispatchEvent(new Event('visibilitychange'))")  # fmt: skip
    page.locator("#events", has_text="told 29").wait_for()
    thread.join()
    assert re.findall(r"told \d\d", page.locator("#events").inner_text()) == [f"told {n:02d}" for n in range(30)]


def test_all_is_read_without_javascript(server: Server, tab, finished: dict[str, str]):
    page = tab(java_script_enabled=False)
    page.goto("/jobs")
    page.get_by_label("API key").fill(server.key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name=finished["done"]).click()
    shown = page.locator("main").inner_text()
    for part in ("succeeded", "1.083", "Be kind.", "It fell too far.", trained.DIGEST, "−0.2345"):
        assert part in shown
    assert not page.locator("figure").first.is_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the signed receipt").click()
    assert download.value.suggested_filename == f"{finished['done']}.receipt.json"
    page.goto(f"/gate/{finished['decision']}")
    assert page.get_by_role("button", name="Release the model").is_visible()


def test_the_keyboard_alone_is_enough(server: Server, tab):
    job_id = new_job(server)
    page = tab()
    press = page.keyboard.press

    def focused() -> str:
        return page.evaluate(
            "document.activeElement.matches('a, button, summary') ? document.activeElement.textContent.trim() : ''"
        )

    def walk(name: str) -> None:
        for _ in range(60):
            press("Tab")
            seen = page.evaluate(
                "(() => { const s = getComputedStyle(document.activeElement);"
                "return s.outlineStyle !== 'none' || document.activeElement.matches('.skip') })()"
            )
            assert seen, f"no focus to be seen on {focused()}"
            if name in focused():
                return
        raise AssertionError(f"{name} is not reached")

    page.goto("/sign-in")
    press("Tab")
    assert focused() == "Skip to the content"
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type(server.key)
    press("Enter")
    page.wait_for_url("**/jobs")
    walk(job_id)
    press("Enter")
    page.wait_for_url(f"**/jobs/{job_id}")
    walk("Pause the job")
    press("Enter")
    page.get_by_text("The job was asked to pause.").wait_for()
    walk("Cancel the job…")
    press("Enter")
    walk("Cancel the job for good")
    press("Space")
    page.get_by_text("The job was asked to cancel.").wait_for()
    walk("Sign out")
    press("Enter")
    page.get_by_text("You are signed out.").wait_for()


EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'><svg onload=alert(3)>{{7*7}}\u202egpj</table>"


def test_what_strangers_wrote_is_text_on_every_page(server: Server, tab):
    """File name, metadata, integration, training row in an error, event, question, answer, names, notes, reasons."""
    key = server.tenant("evil")
    name = "<img src=x onerror=alert(1)><script>alert(2)<script>.jsonl"  # no slash: that would end a file's name
    row = ROW.replace("2+2?", EVIL.replace('"', '\\"'))
    with server.client(key) as client:
        file = client.files.create(file=(name, (row * 12).encode()), purpose="fine-tune").id
        wandb = {"type": "wandb", "wandb": {"project": EVIL, "tags": [EVIL[:60]]}}
        job_id = client.fine_tuning.jobs.create(
            model=BASE, training_file=file, metadata={EVIL[:60]: EVIL}, integrations=[wandb]
        ).id
    decision = trained.decided(server, job_id, "hold", answer=EVIL, question=EVIL)
    trained.tell(server, job_id, EVIL)
    trained.move(server, job_id, error={"code": EVIL[:40], "message": EVIL, "param": EVIL[:40]}, suffix=EVIL[:64])
    page = tab(key)

    def harmless(least: int) -> None:
        assert page.locator("main").inner_text().count("onerror=alert(1)") >= least
        assert page.locator("main img, main script, main [onerror], main svg:not(.chart)").count() == 0
        assert "49[U+202E]" not in page.locator("main").inner_text()
        assert "\u202e" not in page.content()
        assert page.evaluate(RULES) == []

    page.goto("/jobs")
    harmless(1)
    page.goto(f"/jobs/{job_id}")
    harmless(9)
    assert name in page.locator("main").inner_text()
    trained.tell(server, job_id, EVIL + " live")
    page.locator("#events li", has_text="live").wait_for()
    assert page.locator("#events img, #events script, #events svg").count() == 0
    page.goto(f"/jobs/{job_id}/events")
    harmless(2)
    for path in (f"/jobs/{EVIL}", f"/jobs?after={EVIL}", f"/{EVIL}"):
        page.goto(path)
        assert page.locator("h1").inner_text() in ("Not found", "This cannot be done")
        assert page.locator("main img, main script, main svg").count() == 0
    page.goto("/keys")
    page.get_by_label("Name").fill(EVIL)
    page.get_by_role("button", name="Make the key").click()
    page.get_by_text("The new key, shown only now").wait_for()
    harmless(1)
    provider = tab(server.key)
    provider.goto(f"/gate/{decision}")
    provider.get_by_label("Your name").fill("<img src=x onerror=alert(1)>")
    provider.get_by_label("Reason").fill(EVIL)
    provider.get_by_role("button", name="Block the model").click()
    provider.get_by_text("The model was blocked").wait_for()
    assert provider.locator("main img, main script, main svg").count() == 0
    assert provider.locator("main").inner_text().count("onerror=alert(1)") == 2
    page.goto(f"/jobs/{job_id}")
    harmless(9)


def test_the_pages_policy_stops_what_would_get_in(server: Server, chromium, site: str):
    """Were some text ever to become HTML, it could neither run, nor send, nor be framed."""
    page = chromium.new_page(base_url=site)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.goto("/sign-in")
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.textContent = "window.ran = 1"; document.body.append(script); } catch (e) { window.stopped = 1; }
          try { document.body.insertAdjacentHTML("beforeend", "<p>x</p>"); } catch (e) { window.sunk = 1; }
        }"""
    )
    assert page.evaluate("window.ran") is None
    assert page.evaluate("window.stopped === 1 && window.sunk === 1")
    assert any("Trusted" in each for each in told)
    framed = chromium.new_page()
    framed.set_content(f'<iframe src="{site}/sign-in"></iframe>')
    framed.wait_for_timeout(500)
    assert "Sign in" not in framed.frames[1].content()
    page.close()
    framed.close()
