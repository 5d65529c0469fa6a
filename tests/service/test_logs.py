"""What a log says of an exception: its type and the places that it passed, and nothing that a customer wrote."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

SECRET = "my landlord's address is"
FAILING = f"""
import logging
import structlog
from holdtrue.errors import RunError
from holdtrue.service.api.telemetry import set_up_logs
from holdtrue.service.settings import ServiceSettings

def read_number(row):
    settings = ServiceSettings(database_url="postgresql://user:pass-word@db.example/holdtrue")
    return int(row)

def read_row(row):
    try:
        return read_number(row)
    except ValueError as error:
        raise RunError("train.jsonl: " + row) from error

set_up_logs()
try:
    read_row("{SECRET}")
except RunError as error:
    structlog.get_logger().exception("worker failed", worker="w")
    structlog.get_logger().error("job failed", job="ftjob-x", error="RunError", exc_info=error)
    logging.getLogger("library").error("a lane failed: %s", error, exc_info=True)
"""
RAISED = "<string>:16:read_row"
READ = "<string>:14:read_row"
NUMBER = "<string>:10:read_number"


def in_a_terminal(script: str) -> str:
    """Run a script whose stderr is a terminal, and return what it wrote there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        told = b""
        while True:
            try:
                piece = os.read(ours, 2**16)
            except OSError:  # as Linux says that nobody writes any more
                break
            if not piece:
                break
            told += piece
        os.close(ours)
    assert process.returncode == 0, told.decode()
    return told.decode()


def in_a_pipe(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("run", [in_a_pipe, in_a_terminal])
def test_an_exception_is_told_by_its_type_and_places_and_no_value(run):
    told = run(FAILING)
    assert SECRET not in told
    assert "pass-word" not in told
    assert "landlord" not in told
    for part in ("RunError", RAISED, "ValueError", READ, NUMBER):
        assert told.count(part) >= 3


def test_a_line_of_json_says_what_led_to_what():
    first, second, library = map(json.loads, in_a_pipe(FAILING).splitlines())
    for line in (first, second, library):
        assert line["error"] == "RunError"
        assert line["places"] == ["<string>:20:<module>", RAISED]
        assert line["causes"] == [{"error": "ValueError", "places": [READ, NUMBER]}]
        assert "exc_info" not in line
    assert (first["event"], first["worker"]) == ("worker failed", "w")
    assert (second["event"], second["job"]) == ("job failed", "ftjob-x")
    assert library["template"] == "a lane failed: %s"
