"""The entry point: one application, one place where errors become exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from holdtrue.cli import (
    backup,
    bench,
    chat,
    demo,
    evaluate,
    export,
    keys,
    listing,
    persona,
    policy,
    scorers,
    screen,
    serve,
    train,
    verify,
)
from holdtrue.cli.output import Result, say, set_up_logging, show, stdout_kept
from holdtrue.errors import HoldtrueError, Interrupted

# Typer carries its own copy of click in some versions: its usage error is reached through a public subclass.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
CODES = (
    "Exit codes: 0 done; 1 failed while running; 2 bad usage or spec; 3 a gate failed or stayed undecided; "
    "4 a defense's need was not met; 5 bad data; 6 incomplete (a budget ran out); 130 interrupted (resumable)."
)

app = typer.Typer(
    name="holdtrue",
    help="Fine-tune a language model on somebody else's data, and the model holds true to its alignment.",
    epilog=CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("eval")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("screen")(screen.screen)
app.command("bench")(bench.bench)
app.command("judge")(evaluate.judge)
app.command("samples")(evaluate.samples)
app.command("defenses")(listing.defenses)
app.command("models")(listing.models)
app.add_typer(scorers.app, name="scorers")
app.command("chat")(chat.chat)
app.command("export")(export.export)
app.command("demo")(demo.demo)
app.add_typer(persona.app, name="persona")
app.command("serve")(serve.serve)
app.add_typer(policy.app, name="policy")
app.command("verify")(verify.verify)
app.add_typer(keys.keys, name="keys")
app.add_typer(keys.organizations, name="organizations")
app.add_typer(keys.projects, name="projects")
app.add_typer(keys.audit, name="audit")
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"holdtrue {version('holdtrue')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    set_up_logging()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    with stdout_kept(as_json) as write:
        try:
            result = typer.main.get_command(app).main(args=arguments, prog_name="holdtrue", standalone_mode=False)
        except HoldtrueError as error:
            return _fail(error, str(error), error.exit_code, write, as_json)
        except USAGE_ERROR as error:
            if not as_json:
                error.show()
            return _fail(error, error.format_message(), error.exit_code, write, as_json, shown=True)
        except typer.Abort as error:
            return _fail(error, "aborted", 130, write, as_json)
        except BrokenPipeError:
            # The reader of a pipe went away: nobody is left to tell.
            sys.stderr.close()
            return 1
        except Exception as error:
            traceback.print_exc()
            return _fail(error, f"{type(error).__name__}: {error}", 1, write, as_json, shown=True)
        if isinstance(result, Result):
            if as_json:
                write(result.document)
            else:
                show(result)
            return result.exit_code
        if result == Interrupted.exit_code:
            return _fail(Interrupted(), "interrupted", 130, write, as_json)
        return int(result or 0)


def _fail(error: BaseException, message: str, code: int, write: Any, as_json: bool, shown: bool = False) -> int:
    if as_json:
        write({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    if not shown:
        say(message if code == Interrupted.exit_code else f"error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
