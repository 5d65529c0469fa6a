"""Finding defenses by name, and reading them from a spec."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
import pkgutil
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from pydantic import ValidationError

from holdtrue.defenses.base import Defense
from holdtrue.errors import SpecError, nearest

logger = logging.getLogger(__name__)

ENTRY_POINTS = "holdtrue.defenses"


class Parameter(NamedTuple):
    """One parameter of a defense, for people: its type as written, its default and its meaning."""

    name: str
    type: str
    default: Any
    meaning: str


class DefenseInfo(NamedTuple):
    """A defense for people."""

    name: str
    badge: str
    paper: str
    summary: str
    parameters: tuple[Parameter, ...]


@functools.cache
def available() -> dict[str, type[Defense]]:
    """Return all defenses by name: those of this package, and those that other packages offer as entry points.

    Another package cannot take a name of ours.
    """
    import holdtrue.defenses as package

    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    own = {c.name: c for c in found if issubclass(c, Defense) and "name" in vars(c)}
    return dict(sorted((_offered() | own).items()))


def _offered() -> dict[str, type[Defense]]:
    """Return the defenses of other packages. One that cannot be loaded is left out with a warning."""
    offered: dict[str, type[Defense]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            defense = point.load()
            if not (inspect.isclass(defense) and issubclass(defense, Defense)):
                raise TypeError(f"{point.value} is no Defense")
            offered[defense.name] = defense
        except Exception as error:
            logger.warning("the defense %s of another package cannot be loaded: %s", point.name, error)
    return offered


def describe(defense: type[Defense]) -> DefenseInfo:
    """Return what a reader of ``holdtrue defenses`` wants to know of a defense."""
    properties = defense.model_json_schema(by_alias=False)["properties"] if defense.model_fields else {}
    parameters = tuple(
        Parameter(name, _type(properties.get(name, {})), field.get_default(), field.description or "")
        for name, field in defense.model_fields.items()
    )
    return DefenseInfo(defense.name, defense.badge, defense.paper, inspect.getdoc(defense) or "", parameters)


def parse(items: Iterable[str | Mapping[str, Any] | Defense]) -> tuple[Defense, ...]:
    """Read the ``defenses`` of a spec, each a name, ``{name: {parameter: value}}`` or a value; return them by name.

    The order of the result is canonical, so that the spec's order changes nothing.

    Raises:
        SpecError: an unknown name or parameter (with the nearest known one), a value out of range, a defense named
            twice, or two that contradict each other (:meth:`Defense.conflicts`).
    """
    found: dict[str, Defense] = {}
    for item in items:
        defense = item if isinstance(item, Defense) else _read(item)
        if defense.name in found:
            raise SpecError(f"defenses: {defense.name!r} stands there twice: give each defense once")
        found[defense.name] = defense
    parsed = tuple(found[name] for name in sorted(found))
    faults = [
        f"defenses: {one.name} contradicts {other.name}: {reason}"
        for one, other in itertools.permutations(parsed, 2)
        if (reason := one.conflicts(other))
    ]
    if faults:
        raise SpecError("\n".join(faults))
    return parsed


def _read(item: str | Mapping[str, Any]) -> Defense:
    if isinstance(item, str):
        name, settings = item, {}
    elif isinstance(item, Mapping) and len(item) == 1:
        name, settings = next(iter(item.items()))
    else:
        raise SpecError(f"defenses: {item!r} is neither a name nor {{name: {{parameter: value}}}}")
    known = available()
    if name not in known:
        raise SpecError(f"defenses: no defense is named {name!r}{nearest(str(name), known)}; known: {', '.join(known)}")
    kind = known[name]
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise SpecError(f"defenses.{name}: expected parameters, got {settings!r}")
    try:
        return kind(**settings)
    except (ValidationError, TypeError) as error:
        raise SpecError(_explain(kind, error)) from error


def _explain(kind: type[Defense], error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return f"defenses.{kind.name}: {error}"
    lines = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"defenses.{kind.name}: no parameter {field!r}{nearest(field, kind.model_fields)}")
        else:
            lines.append(f"defenses.{kind.name}.{field}: {fault['msg']}, got {fault['input']!r}")
    return "\n".join(lines)


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(_type(s) for s in schema["anyOf"])
    return str(schema.get("type", "any"))
