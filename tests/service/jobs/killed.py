"""A role that is killed at a stated point: ``killed.py ROLE MODULE:NAME before|after CALL [ARGUMENT]``."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from holdtrue.service.jobs.dispatcher import Dispatcher
from holdtrue.service.jobs.worker import Worker
from holdtrue.service.serve import serve
from holdtrue.service.settings import ServiceSettings


def find(target: str) -> tuple[Any, str]:
    """Return what holds the function that ``MODULE:NAME`` names, and its name there."""
    module, _, dotted = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = dotted.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def die_at(target: str, when: str, call: int, wanted: str) -> None:
    owner, name = find(target)
    inner, calls = getattr(owner, name), 0

    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += not wanted or wanted in (*map(str, args), *map(str, kwargs.values()))
        dies = calls == call
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, outer)


if __name__ == "__main__":
    role, target, when, call = sys.argv[1:5]
    die_at(target, when, int(call), sys.argv[5] if len(sys.argv) > 5 else "")
    settings = ServiceSettings()
    match role:
        case "api":
            serve(settings, "api", lambda line: print(line, flush=True))
        case "dispatcher":
            dispatcher = Dispatcher(settings)
            dispatcher.validate_one()
            dispatcher.sweep()
        case _:
            Worker(settings).work_one()
