"""Errors as OpenAI's API writes them, on every path: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from limits.errors import StorageError
from pydantic import BaseModel
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from holdtrue.errors import HoldtrueError, SpecError
from holdtrue.service.policy import RefusalError
from holdtrue.service.policy.store import PolicyUnreadableError
from holdtrue.service.quotas import QuotaError
from holdtrue.service.store.away import StoreAwayError
from holdtrue.service.store.database import trouble

INVALID = "invalid_request_error"
_LONGEST = 300
_BRANCH = re.compile(r"[^\w]")
"""In the name of a union's branch, and in no name of a field: "literal['auto']", "constrained-int", "list[…]"."""
_NO_ROOM = "The service has no room left at the moment"


class ErrorDetail(BaseModel):
    """What went wrong. ``param`` names the field or query parameter, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(HoldtrueError):
    """An answer that is not a success, said on purpose.

    Args:
        status: HTTP status.
        message: what was wrong and what to do next; it reaches the customer.
        type: OpenAI's kind of error.
        param: the field it is about.
        code: for programs.
        headers: such as ``retry-after``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.detail = ErrorDetail(message=clean(message, 4000), type=type, param=param and clean(param), code=code)
        self.headers = dict(headers or {})
        super().__init__(message)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be done as it is: 400."""
    return ApiError(400, message, param=param, code=code)


def not_found(kind: str, name: str, *, param: str = "id", code: str | None = None) -> ApiError:
    """Something that is not there, or is another tenant's: the two are the same to whoever asks."""
    return ApiError(404, f"There is no {kind} {clean(name, 80)!r}", param=param, code=code)


def no_valid_key(message: str, code: str | None = "invalid_api_key") -> ApiError:
    """Somebody who shows no key, or none that works: 401."""
    return ApiError(401, message, code=code, headers={"www-authenticate": 'Bearer realm="holdtrue"'})


def clean(text: str, longest: int = _LONGEST) -> str:
    """Return a text from outside as it may stand in an answer: valid Unicode, no control characters, not long."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def respond(error: ApiError) -> Response:
    """Return the answer of an error."""
    body = json.dumps({"error": error.detail.model_dump()})
    return Response(body, error.status, headers=error.headers, media_type="application/json")


def translate(error: Exception) -> ApiError:
    """Return what a customer is told of an exception; anything unforeseen is a 500 that tells nothing."""
    match error:
        case ApiError():
            return error
        case RefusalError():
            return invalid(str(error), error.param, "policy_refusal")
        case QuotaError():
            headers = {"x-should-retry": "false"}  # a client's few quick retries cannot help
            if error.retry_after is not None:
                headers["retry-after"] = str(error.retry_after)
            return ApiError(429, str(error), type="insufficient_quota", code=error.code, headers=headers)
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            return _of_http(error)
        case SpecError():
            return invalid(str(error))
        case OperationalError() | PoolTimeoutError():  # a server that is away, or no connection to be had
            if trouble(error) == "full":
                return _unavailable(_NO_ROOM)
            return _unavailable("The service cannot reach its database at the moment")
        case StoreAwayError():
            return _unavailable("The service cannot reach its object store at the moment")
        case StorageError():
            return _unavailable("The service cannot count requests at the moment")
        case PolicyUnreadableError():
            return _unavailable("The service cannot read the policy of this model at the moment")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return _unavailable(_NO_ROOM)
        case _:
            return ApiError(
                500,
                "The server had an error while processing your request. Retry it; tell the provider the request id if "
                "it happens again.",
                type="server_error",
                code="internal_error",
            )


def _unavailable(message: str) -> ApiError:
    headers = {"retry-after": "5"}
    return ApiError(503, f"{message}; try again", type="server_error", code="unavailable", headers=headers)


def _of_validation(found: Sequence[Any]) -> ApiError:
    first, told = _closest(found)
    kind, loc = first["type"], [str(part) for part in first["loc"] if not isinstance(part, int)]
    where, path = (loc[0], loc[1:]) if loc else ("body", [])
    # A union's branches stand in the location as well: "tagged-union[…]", "literal['auto']", "int".
    path = path[:-2] if path[-1:] == ["[key]"] else path  # a key that is wrong is a fault of the whole
    path = [part for part in path if part.replace("_", "").isalnum() and part not in ("int", "float", "str")]
    param = ".".join(path) or None
    if kind == "json_invalid" or (where == "body" and not path and kind in ("missing", "model_attributes_type")):
        return invalid("We could not parse the JSON body of your request: it must be one JSON object", code="json")
    if kind == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {clean(param or '')}", param, "unknown_parameter")
    if kind == "missing":
        return invalid(f"Missing required parameter: '{param}'", param, "missing_required_parameter")
    return invalid(f"Invalid value for '{param}': {told}", param, "invalid_value")


def _closest(found: Sequence[Any]) -> tuple[Any, str]:
    """Return the first error and its message; of a union, that of the branch whose type the value has."""
    first = found[0]
    depth = next((at for at, part in enumerate(first["loc"]) if isinstance(part, str) and _BRANCH.search(part)), None)
    if depth is None:
        return first, _message(first)
    branches: dict[Any, Any] = {}  # the first error of each
    for error in found:
        if len(error["loc"]) > depth and error["loc"][:depth] == first["loc"][:depth]:
            branches.setdefault(error["loc"][depth], error)
    for error in branches.values():
        if len(error["loc"]) > depth + 1 or not error["type"].endswith(("_type", "literal_error")):
            return error, _message(error)
    start = "Input should be "
    return first, start + " or ".join(dict.fromkeys(each["msg"].removeprefix(start) for each in branches.values()))


def _message(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("model_type", "model_attributes_type"):
        return "Input should be an object"  # pydantic's message speaks of Python
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        return f"{message}, and not '{clean(error['input'], 80)}'"
    return message


def _of_http(error: HTTPException) -> ApiError:
    headers = {key.lower(): value for key, value in (error.headers or {}).items()}
    if error.status_code == 404:
        return ApiError(404, "Invalid URL: there is nothing at this path", code="unknown_url", headers=headers)
    if error.status_code == 405:
        return ApiError(405, "This method is not allowed here", code="method_not_supported", headers=headers)
    status = error.status_code if error.status_code >= 400 else 500
    message = str(error.detail) if status < 500 else "The server had an error while processing your request"
    return ApiError(status, message, type=INVALID if status < 500 else "server_error", headers=headers)


Answer = Callable[[Scope, ApiError], Response]
"""From a request's scope and an error to what is answered."""


def install(app: FastAPI, answer: Answer) -> None:
    """Make an application answer its errors; what nobody foresaw is left to the edge."""

    async def handle(request: Request, error: Exception) -> Response:
        told = translate(error)
        if told.status >= 500:
            raise error  # the edge answers it, and has it for the log
        return answer(request.scope, told)

    for kind in (HoldtrueError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of a route for the OpenAPI document; those of every route are always in."""
    every = {400, 401, 403, 404, 413, 429, 500, 503, *statuses}
    return {status: {"model": ErrorBody} for status in sorted(every)}
