"""holdtrue chat: talk to a model, a run or an adapter in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdtrue.cli.output import Result, say
from holdtrue.errors import RunError, SpecError

if TYPE_CHECKING:
    from holdtrue.serving.engine import TransformersEngine
    from holdtrue.serving.port import ChatRequest

NEW = "/new"


def chat(
    target: Annotated[str, typer.Argument(help="A run, an adapter's folder, or a model.", show_default=False)],
    message: Annotated[
        str | None, typer.Option(help="Ask this one thing and print the answer.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system turn before all others.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token each time.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this probability.")
    ] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens [default: 1024].", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the answers; the same one repeats them.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model under an adapter, if not the one it records.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --message: print one JSON document on stdout and nothing else.")
    ] = False,
) -> Result | None:
    """Talk to a model: a line is a message. /new begins again, Ctrl-C stops an answer, Ctrl-D ends."""
    if as_json and message is None:
        raise SpecError("--json needs --message: a conversation is no document")
    from holdtrue.data import Message
    from holdtrue.serving.engine import TransformersEngine
    from holdtrue.serving.port import ChatRequest

    where, about = _find(target, base)
    how = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    opening = () if system is None else (Message("system", system),)
    engine = TransformersEngine()
    try:
        if message is not None:
            request = ChatRequest(messages=(*opening, Message("user", message)), **where, **how)
            return _once(engine, request)
        say(f"{about}. A line is a message; {NEW} begins again, Ctrl-C stops an answer, Ctrl-D ends.")
        said = opening
        for line in _lines():
            if line == NEW:
                said = opening
                continue
            request = ChatRequest(messages=(*said, Message("user", line)), **where, **how)
            answer = _answer(engine, request)
            if answer:
                said = (*request.messages, Message("assistant", answer))
    finally:
        engine.close()
    return None


def _find(target: str, base: str | None) -> tuple[dict[str, Any], str]:
    """Return what of a request names the model, and words for it."""
    from holdtrue.models.digest import tree_digest
    from holdtrue.runs import Run, find_target, is_run
    from holdtrue.serving.port import AdapterRef

    about = target
    if is_run(Path(target)):
        if base is not None:
            raise SpecError("--base is for an adapter's folder; a run knows its model")
        run = Run(target)
        if not run.is_done("finalise"):
            raise RunError(f"{run.path} has no adapter yet: holdtrue resume {run.path}")
        name, revision, adapter = run.spec.model, run.manifest["model"]["revision"], run.adapter
        outcome = run.gate["outcome"] if run.gate else None
        about += f" (gate: {outcome})" if outcome else " (no gate has looked at it)"
    else:
        found = find_target(target, base)
        name, revision, adapter = found.source.name, found.source.revision, found.adapter
    ref = None if adapter is None else AdapterRef(tree_digest(adapter), str(adapter))
    return {"base": name, "revision": revision, "adapter": ref}, about


def _once(engine: TransformersEngine, request: ChatRequest) -> Result:
    from holdtrue.serving.port import Delta, Started

    document: dict[str, Any] = {"answer": ""}
    with engine.answer(request) as events:
        for event in events:
            match event:
                case Started():
                    document |= {"revision": event.revision, "adapter": event.digest}
                    document["prompt_tokens"] = event.prompt_tokens
                case Delta():
                    document["answer"] += event.text
                    document |= {"completion_tokens": event.generated, "finish_reason": event.finish}
    return Result(document, lambda console: print(_printable(document["answer"])))


def _lines() -> Iterator[str]:
    """Yield what somebody types, line by line, until the end of input or Ctrl-C."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(engine: TransformersEngine, request: ChatRequest) -> str:
    """Print an answer as it comes; return it, or what of it came before Ctrl-C."""
    from holdtrue.serving.port import ChatError, Delta

    answer = ""
    try:
        with engine.answer(request) as events:
            for event in events:
                if isinstance(event, Delta):
                    answer += event.text
                    print(_printable(event.text), end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ChatError as error:
        say(f"error: {error}")
        return ""
    print(flush=True)
    return answer


def _printable(text: str) -> str:
    """Return text without what a terminal would obey: a model writes what its rows taught it."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)
