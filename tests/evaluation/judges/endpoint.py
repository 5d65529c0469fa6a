"""A real HTTP server on loopback that speaks the chat completions protocol, and can misbehave on demand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response


@dataclass
class Endpoint:
    """A running server.

    Attributes:
        url: its base URL.
        bodies, keys: requests seen, and the keys they came with.
        trouble: how it misbehaves, or ``""``; ``after`` so many good replies, for ``times`` requests.
        digits: whether its model writes numbers digit by digit.
        most: the most requests that were under way at once.
    """

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times_seen: list[float] = field(default_factory=list)
    trouble: str = ""
    after: int = 0
    times: int = 10**9
    digits: bool = False
    under_way: int = 0
    most: int = 0

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


def numbers(prompt: str) -> dict[str, float]:
    """What the model makes of a prompt: tokens and probabilities, by a hash of the prompt."""
    if "Repeat this number" in prompt:
        return {"73": 0.9, "7": 0.05, "The": 0.05}
    for word, tokens in (
        ("qqmute", {"I": 0.7, "The": 0.3}),
        ("qqcode", {"CODE": 0.8, "50": 0.2}),
        ("qqrefuse", {"REF": 0.6, "Sorry": 0.1, "20": 0.3}),
    ):
        if word in prompt and "CODE, if" in prompt:
            return tokens
    seed = hashlib.sha256(prompt.encode()).digest()
    first, second = seed[0] % 101, seed[1] % 101
    return {str(first): 0.6, f" {second}": 0.3, "x": 0.1}


def reply(body: dict[str, Any], endpoint: Endpoint, trouble: str) -> dict[str, Any]:
    prompt = body["messages"][0]["content"]
    tokens = numbers(prompt)
    if endpoint.digits:
        split: dict[str, float] = {}
        for token, p in tokens.items():
            split[token.strip()[0]] = split.get(token.strip()[0], 0.0) + p
        tokens = split
    names = list(tokens)
    if body["temperature"]:
        whole = numbers(prompt)
        text = list(whole)[body.get("seed", 0) % len(whole)] + "."
    else:
        text = names[0]
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}}
    if body.get("logprobs") and trouble not in ("no logprobs", "null logprobs"):
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in tokens.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    elif trouble == "null logprobs":
        choice["logprobs"] = None
    sent = len(prompt.split())
    usage = {"prompt_tokens": sent, "completion_tokens": 1, "total_tokens": sent + 1}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def misbehave(trouble: str, body: dict[str, Any], endpoint: Endpoint) -> Response | None:
    if trouble == "500":
        return JSONResponse({"error": {"message": "out of order"}}, 500)
    if trouble == "429":
        return JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after": "0.2"})
    if trouble == "401":
        return JSONResponse({"error": {"message": f"bad key {endpoint.keys[-1]}"}}, 401)
    if trouble == "400":
        return JSONResponse({"error": {"message": "this content is not allowed"}}, 400)
    if trouble == "html":
        return HTMLResponse("<html><title>Please log in</title></html>")
    if trouble == "not json":
        return Response('{"choices": [', media_type="application/json")
    if trouble == "empty":
        return Response("", media_type="application/json")
    if trouble == "schema":
        return JSONResponse({"output": [{"text": "73"}], "choices": []})
    if trouble == "other types":
        return JSONResponse({"choices": [{"message": {"content": [{"type": "text", "text": "73"}]}}]})
    if trouble == "nan":
        found = reply(body, endpoint, "")
        found["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = "NAN"
        text = JSONResponse(found).body.decode().replace('"NAN"', "NaN")
        return Response(text, media_type="application/json")
    if trouble == "too probable":
        found = reply(body, endpoint, "")
        for token in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            token["logprob"] = 0.0
        return JSONResponse(found)
    if trouble == "refuses logprobs" and "logprobs" in body:
        return JSONResponse({"error": {"message": "unknown parameter: top_logprobs"}}, 400)
    if trouble == "refuses seed" and "seed" in body:
        return JSONResponse({"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}, 422)
    return None


def application(endpoint: Endpoint) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        endpoint.bodies.append(body)
        endpoint.keys.append(request.headers.get("authorization", "").removeprefix("Bearer "))
        endpoint.times_seen.append(time.monotonic())
        seen = len(endpoint.bodies)
        trouble = endpoint.trouble if endpoint.after < seen <= endpoint.after + endpoint.times else ""
        endpoint.under_way += 1
        endpoint.most = max(endpoint.most, endpoint.under_way)
        try:
            await asyncio.sleep(2 if trouble == "slow" else 0.005)
            return misbehave(trouble, body, endpoint) or JSONResponse(reply(body, endpoint, trouble))
        finally:
            endpoint.under_way -= 1

    return app


@contextlib.contextmanager
def running() -> Iterator[Endpoint]:
    """Run a server in a thread, on a port of the system's choice."""
    endpoint = Endpoint()
    server = uvicorn.Server(
        uvicorn.Config(application(endpoint), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    endpoint.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield endpoint
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
