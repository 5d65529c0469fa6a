"""Starts a service: all of it under one supervisor, or one role as this process."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from typing import cast, get_args

from pydantic import BaseModel, SecretStr

from holdtrue.errors import RunError, SpecError
from holdtrue.service import tenancy
from holdtrue.service.policy import store as policies
from holdtrue.service.settings import Role, ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.database import Database
from holdtrue.service.supervisor import Child, Supervisor, stop_event, watch_lifeline
from holdtrue.serving.loopback import is_loopback

ROLES: tuple[str, ...] = get_args(Role)
PARTS = ("api", "dispatcher", "worker", "inference")
SIGNING = ("all", "api", "worker")
"""The roles that sign receipts: of jobs, and of people's decisions."""
_KEEP_ALIVE = 75
_GRACE = 25


def serve(settings: ServiceSettings, role: Role = "all", announce: Callable[[str], None] = print) -> None:
    """Run a service, or one role of it, until SIGTERM or SIGINT.

    Args:
        settings: of the service.
        role: ``all`` starts every part as a process of its own; any other is this process.
        announce: gets the lines that somebody waits for: the address, and the first key.

    Raises:
        SpecError: an address beyond this machine without a word on TLS; no signing key that all hosts have, over a
            database that they share.
        RunError: the address is taken, or the object store's disk is not there.
    """
    if role in ("all", "api"):
        check_exposure(settings)
    if role in SIGNING:
        from holdtrue.service.evidence.signing import check_key

        check_key(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    settings.home.chmod(0o700)
    if role not in ("all", "api"):
        if role != "inference":  # which asks the object store alone
            _prepare(settings, prints=False)
        run_role(settings, role)
        return
    with listen(settings.host, settings.port) as sock:
        key = _prepare(settings, prints=True)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        announce(f"holdtrue serves http://{host}:{sock.getsockname()[1]}/v1")
        if key is not None:
            announce(f"first key, shown only now: {key}")
        if role == "api":
            run_role(settings, role, sock)
        else:
            _supervise(settings, sock)


def check_exposure(settings: ServiceSettings) -> None:
    """Refuse an address that others can reach, unless somebody said that TLS is in front of it."""
    if not is_loopback(settings.host) and not settings.behind_tls:
        raise SpecError(
            f"host {settings.host!r} can be reached from other machines, and keys would cross the network in clear: "
            "put a proxy with TLS in front and say --behind-tls, or listen on 127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. ``RunError`` where it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found = socket.create_server((host, port), family=family, backlog=512)
        # asyncio sets this only on sockets that name their protocol; without it each answer waits 40 ms for the client.
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    except OSError as error:
        raise RunError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None


def _prepare(settings: ServiceSettings, *, prints: bool) -> str | None:
    """Bring the database up to this version; the first key is made by a role that prints it, and is returned."""
    with contextlib.closing(Database(settings.database)) as db:
        migrations.upgrade(db)
        _check_store(settings, db)
        policies.keep_meanings(db)
        return tenancy.bootstrap(db).key if prints else None


def _check_store(settings: ServiceSettings, db: Database) -> None:
    """Refuse a bare store beside a database that names content: new content would lie under the disk once mounted."""
    from holdtrue.service.store.blobs import Blobs
    from holdtrue.service.store.named import named

    if not Blobs(settings.blobs).is_bare():
        return
    with db.read() as session:
        count = len(named(session))
    if count:
        raise RunError(
            f"the object store at {settings.blobs} holds nothing, and the database names {count} files and folders in "
            "it: mount its disk, give the right --blob-url, or restore a backup"
        )


def run_role(settings: ServiceSettings, role: str, sock: socket.socket | None = None) -> None:
    """Be one role until told to stop."""
    from holdtrue.service.api.telemetry import set_up_logs

    set_up_logs()
    match role:
        case "api":
            _run_api(settings, sock or listen(settings.host, settings.port))
        case "dispatcher":
            from holdtrue.service.jobs.dispatcher import Dispatcher

            Dispatcher(settings).run(stop_event())
        case "worker":
            from holdtrue.service.jobs.worker import Worker

            Worker(settings).run(stop_event())
        case "inference":
            from holdtrue.service.scratch import Scratch
            from holdtrue.service.store.blobs import Blobs
            from holdtrue.serving.server import run

            stop_event()  # as for the API
            with Scratch(settings.home) as place:
                run(settings, Blobs(settings.blobs).fetch_tree, place)
        case _:
            raise SpecError(f"role must be one of {', '.join(ROLES)}, and not {role!r}")


def _run_api(settings: ServiceSettings, sock: socket.socket) -> None:
    import uvicorn

    from holdtrue.service.api.app import create_app

    app = create_app(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
    )
    stop_event()  # uvicorn hands a signal on once it has stopped in order; without this it would end as if killed
    server = uvicorn.Server(config)
    app.state.stopping = lambda: server.should_exit  # streams end by themselves then
    server.run(sockets=[sock])


def _supervise(settings: ServiceSettings, sock: socket.socket) -> None:
    from holdtrue.service.api.telemetry import set_up_logs

    set_up_logs()
    settings = settings.model_copy(update=_inference(settings))
    command = [sys.executable, "-m", "holdtrue.service.serve", "--role"]
    children = []
    for part in PARTS:
        if part == "api":
            handle = sock.fileno()
            children.append(Child(part, [*command, part, "--socket", str(handle)], (handle,)))
        else:
            children.append(Child(part, [*command, part]))
    Supervisor(children, environment(settings)).run(stop_event())


def _inference(settings: ServiceSettings) -> dict[str, object]:
    """Return an address and a secret for the inference process, where the settings leave them open."""
    found: dict[str, object] = {}
    if not settings.inference_secret.get_secret_value():
        found["inference_secret"] = SecretStr(secrets.token_urlsafe(32))
    if "inference_url" not in settings.model_fields_set:
        with socket.create_server(("127.0.0.1", 0)) as free:
            found["inference_url"] = f"http://127.0.0.1:{free.getsockname()[1]}"
    return found


def environment(settings: ServiceSettings) -> dict[str, str]:
    """Return the variables from which another process reads the same settings."""
    found = {}
    for name in ServiceSettings.model_fields:
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        elif isinstance(value, BaseModel):
            value = value.model_dump_json()
        found[f"HOLDTRUE_{name.upper()}"] = str(value)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Be a role of a supervised service; its settings come from the environment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", required=True, choices=PARTS)
    parser.add_argument("--socket", type=int)
    parser.add_argument("--lifeline", type=int)
    options = parser.parse_args(argv)
    if options.lifeline is not None:
        watch_lifeline(options.lifeline)
    sock = None if options.socket is None else socket.socket(fileno=options.socket)
    run_role(ServiceSettings(), cast(Role, options.role), sock)


if __name__ == "__main__":
    main()
