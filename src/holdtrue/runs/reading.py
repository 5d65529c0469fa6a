"""Reading a spec's YAML strictly, and changing values in it from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from holdtrue.errors import SpecError, nearest


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, which PyYAML lets the last one win, and with YAML 1.2's booleans alone.

    In YAML 1.1, which PyYAML reads, ``on`` and ``no`` are booleans: a parameter of that name could not be written.
    """


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    first: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is not text; put it in quotes", key_node.start_mark
            )
        if key in first:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is there twice, first on line {first[key]}", key_node.start_mark
            )
        first[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_StrictLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if first in "tTfF" or rule[0] != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document; ``SpecError`` names ``where``, line and column of a fault."""
    try:
        # A SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{where}{place}: {error.problem or 'cannot be read as YAML'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"{where}: cannot be read as YAML: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SpecError(f"{path}: no such spec file{nearest(path.name, beside)}") from None
    except IsADirectoryError:
        hint = f"; to go on with that run: holdtrue resume {path}" if (path / "spec.json").exists() else ""
        raise SpecError(f"{path} is a folder, a spec is a YAML file{hint}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise SpecError(f"{path}: a spec is a mapping with at least the keys model and data; this is {found}")
    return value


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set each ``key.path=value`` in the mapping, in order, and return it.

    Inside a list, a part of the path is an index or the name of an item such as ``kl`` or ``kl: {...}``.
    """
    for item in overrides:
        path, separator, text = item.partition("=")
        parts = path.strip().split(".")
        if not separator or not all(parts):
            raise SpecError(f"--set {item}: write it as key.path=value, such as training.seed=1")
        _set(values, parts, parse_yaml(text, f"--set {item}"), item)
    return values


def _set(container: Any, parts: list[str], value: Any, item: str) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(container, list):
        index = _find(container, head, item)
        if not rest:
            container[index] = value if head.isdigit() else {head: value}
            return
        if container[index] == head:
            container[index] = {head: {}}
        inner = container[index]
        if not head.isdigit() and isinstance(inner, dict):
            if inner.get(head) is None:
                inner[head] = {}
            inner = inner[head]
        _set(inner, rest, value, item)
    elif isinstance(container, dict):
        if not rest:
            container[head] = value
            return
        if container.get(head) is None:
            container[head] = {}
        _set(container[head], rest, value, item)
    else:
        raise SpecError(f"--set {item}: {container!r} holds no key {head!r}")


def _find(items: list[Any], name: str, item: str) -> int:
    if name.isdigit() and int(name) < len(items):
        return int(name)
    for index, entry in enumerate(items):
        if entry == name or (isinstance(entry, dict) and name in entry):
            return index
    raise SpecError(f"--set {item}: the spec's list has no {name!r}; set the whole list to add it")
