"""Question files: open questions in the YAML format of the published evaluations of emergent misalignment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from holdtrue.errors import DataError, Problem, nearest
from holdtrue.evaluation.prompts import Prompt

if TYPE_CHECKING:
    from yaml import Node

MAX_BYTES = 2**20
MAX_PROMPTS = 10_000
MAX_CHARS = 8 * 2**20
"""Of all prompts together: aliases can make a small file large."""

TYPES = ("free_form_judge_0_100", "free_form")
READ = ("id", "type", "paraphrases", "system", "theme", "template")
IGNORED = ("samples_per_paraphrase", "temperature", "max_tokens", "judge", "judge_prompts", "notice")
"""Keys of the published files whose place our settings take, and words about use."""

SLOT = "{question}"
_FORM = re.compile(r"(.+)[_/](json|template)")
_MAX_KEYS = 50
_MAX_PROBLEMS = 50
_TAG = "tag:yaml.org,2002:"
_NAMES = {
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "a boolean",
    "null": "null",
    "timestamp": "a date",
    "seq": "a list",
    "map": "a mapping",
}


def read_questions(path: str | Path) -> tuple[Prompt, ...]:
    """Read a question file: a YAML list of entries, each a question in one form.

    An entry has an ``id``, a list of ``paraphrases`` (each becomes a prompt; the second of ``id`` is ``id#2``), and
    perhaps a ``system`` prompt, which is sent; a ``theme``; a ``template`` that holds ``{question}``, put around each
    paraphrase. An id that ends in ``_json`` or ``_template`` (or ``/json``, ``/template``) is that form of the question
    before the ending. Judge prompts and sample counts are passed over: the judge's own rubric and the evaluation's
    settings are used. Nothing in the file is constructed or run; only its text is read.

    Returns:
        The prompts, in the file's order.

    Raises:
        DataError: listing every fault with its line and field: an unknown key (a misspelled ``system`` would silently
            change what is asked), a wrong type, an id or a prompt that is there twice; or a file over 1 MB, or one that
            aliases expand to over 10,000 prompts or 8 MB.
    """
    path = Path(path)
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    ids: dict[str, int] = {}
    asked: dict[tuple[str, ...], int] = {}
    chars = 0
    for line, where, found in _all_parts(path):
        if isinstance(found, str):
            problems.append(Problem(line, where, found))
            if len(problems) >= 20 * _MAX_PROBLEMS:
                break
            continue
        chars += sum(len(message.content) for message in found.messages)
        if len(prompts) == MAX_PROMPTS or chars > MAX_CHARS:
            limit = f"over {MAX_PROMPTS:,} prompts or {MAX_CHARS // 2**20} MB"
            problems.append(Problem(line, where, f"from here the file expands to {limit}; split it"))
            break
        prompts.append(found)
        key = tuple(" ".join([m.role, *m.content.split()]).casefold() for m in found.messages)
        if found.id in ids:
            problems.append(Problem(line, where, f"the id {found.id!a} is there already, on line {ids[found.id]}"))
        elif key in asked:
            same = f"asks the same as line {asked[key]}, under the same system prompt; ask each question once"
            problems.append(Problem(line, where, same))
        ids.setdefault(found.id, line)
        asked.setdefault(key, line)
    if problems:
        raise DataError(path, problems[:_MAX_PROBLEMS], len(problems))
    return tuple(prompts)


_Part = tuple[int, str, "Prompt | str"]
"""A line, a field, and a prompt or what is wrong there."""


def _all_parts(path: Path) -> Iterator[_Part]:
    from yaml import SequenceNode

    root = _compose(path)
    if not isinstance(root, SequenceNode):
        name = _name(root) if root else "nothing"
        yield 0, "", f"must be a list of questions (`- id: ...`), not {name}"
    elif not root.value:
        yield 0, "", "the list is empty: it needs at least one question"
    else:
        fields: dict[int, dict[str, Node] | str] = {}
        for index, node in enumerate(root.value):
            yield from _entry_parts(f"questions[{index}]", node, fields)


def _compose(path: Path) -> Node | None:
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DataError(path, [Problem(0, "", f"is larger than {MAX_BYTES // 2**20} MB; split it")])
        return yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        beside = [other.name for other in path.parent.glob("*.y*ml")] if isinstance(error, FileNotFoundError) else []
        message = f"cannot be read: {error.strerror or error}{nearest(path.name, beside)}"
        raise DataError(path, [Problem(0, "", message)]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(path, [Problem(line, "", f"not UTF-8: 0x{error.object[error.start]:02x}")]) from None
    except RecursionError:
        raise DataError(path, [Problem(0, "", "lists or mappings are nested too deeply")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise DataError(path, [Problem(line, "", f"not YAML: {error.problem} at column {column}")]) from None
    except yaml.YAMLError as error:
        raise DataError(path, [Problem(0, "", f"not YAML: {' '.join(str(error).split())[:200]}")]) from None


def _entry_parts(where: str, node: Node, cache: dict[int, dict[str, Node] | str]) -> Iterator[_Part]:
    from yaml import SequenceNode

    line = node.start_mark.line + 1
    fields = _fields(node, cache)
    if isinstance(fields, str):
        yield line, where, fields
        return
    faults = [
        (key, f"unknown key{nearest(key, READ)}; known: {', '.join(READ)}")
        for key in fields
        if key not in READ and key not in IGNORED
    ]
    texts = {key: _text(fields[key], key) for key in READ if key in fields and key != "paraphrases"}
    values = {key: text for key, (text, fault) in texts.items() if text is not None and not fault}
    faults += [(key, fault) for key, (_, fault) in texts.items() if fault]
    if "id" not in fields:
        faults.append(("id", "is missing"))
    if values.get("type", TYPES[0]) not in TYPES:
        faults.append(("type", f"{values['type'][:60]!a} is not scored on a scale; known: {', '.join(TYPES)}"))
    if "template" in values and values["template"].count(SLOT) != 1:
        faults.append(("template", f"must hold {SLOT} once, where the question goes"))
    listed = fields.get("paraphrases")
    if listed is None:
        faults.append(("paraphrases", "is missing"))
    elif not isinstance(listed, SequenceNode):
        faults.append(("paraphrases", f"must be a list of strings, not {_name(listed)}"))
    elif not listed.value:
        faults.append(("paraphrases", "is empty"))
    for key, fault in faults:
        at = fields[key].start_mark.line + 1 if key in fields else line
        yield max(line, at), f"{where}.{_shown(key)}", fault
    if not isinstance(listed, SequenceNode):
        return
    for index, item in enumerate(listed.value):
        text, fault = _text(item, "paraphrases")
        # An alias stands where its anchor stands, which is no place in this entry.
        part = max(line, item.start_mark.line + 1), f"{where}.paraphrases[{index}]"
        if text is None or fault:
            yield *part, fault
        elif not faults:
            yield *part, _prompt(values, text, index)


def _prompt(values: dict[str, str], text: str, index: int) -> Prompt:
    from holdtrue.data import Message

    form = _FORM.fullmatch(values["id"])
    asked = values.get("template", SLOT).replace(SLOT, text)
    turns = [Message("system", values["system"])] if "system" in values else []
    return Prompt(
        id=values["id"] if index == 0 else f"{values['id']}#{index + 1}",
        question=form[1] if form else values["id"],
        theme=values.get("theme", "general"),
        form=form[2] if form else "plain",
        messages=(*turns, Message("user", asked)),
        asked=asked,
    )


def _fields(node: Node, cache: dict[int, dict[str, Node] | str]) -> dict[str, Node] | str:
    """Return a mapping's values by key with its merges (``<<``) resolved, or what is wrong with it.

    Each mapping is resolved once, however often it is merged, and may have few keys: no file can blow up.
    """
    from yaml import MappingNode, ScalarNode, SequenceNode

    if not isinstance(node, MappingNode):
        return f"must be a mapping with {', '.join(READ[:3])}, not {_name(node)}"
    if id(node) in cache:
        return cache[id(node)]
    cache[id(node)] = "merges itself"
    if len(node.value) > _MAX_KEYS:
        return f"has over {_MAX_KEYS} keys"
    own: dict[str, Node] = {}
    merged: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            return f"has {_name(key)} as a key"
        if key.tag == f"{_TAG}merge":
            others = value.value if isinstance(value, SequenceNode) else [value]
            if len(others) > _MAX_KEYS:
                return f"merges over {_MAX_KEYS} mappings"
            for other in others:
                found = _fields(other, cache)
                if isinstance(found, str):
                    return f"<<: {found}"
                merged = found | merged
        elif key.value in own:
            return f"has the key {_shown(key.value)} twice"
        else:
            own[key.value] = value
    cache[id(node)] = merged | own
    return merged | own


def _text(node: Node, key: str) -> tuple[str | None, str]:
    """Return a value's text and what is wrong with it; ``None`` where no value is given, which only some keys allow."""
    from yaml import ScalarNode

    from holdtrue.data import text_fault

    if isinstance(node, ScalarNode) and (node.tag == f"{_TAG}str" or (node.tag == f"{_TAG}int" and key == "id")):
        text = node.value
        if fault := text_fault(text):
            return None, fault
        if key in ("id", "theme") and (len(text) > 100 or not text.isprintable() or text != text.strip()):
            return None, "must be one line of at most 100 printable characters"
        return text, ""
    if node.tag == f"{_TAG}null" and key in ("system", "theme", "template"):
        return None, ""
    hint = "; put quotes around it" if isinstance(node, ScalarNode) and node.tag != f"{_TAG}null" else ""
    return None, f"must be a string, not {_name(node)}{hint}"


def _name(node: Node) -> str:
    return _NAMES.get(node.tag.removeprefix(_TAG), "a value of another type")


def _shown(key: str) -> str:
    from holdtrue.data.jsonl import shown_key

    return shown_key(key)
