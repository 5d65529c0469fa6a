"""The spec of a run: a frozen value, read from YAML, with every fault named at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from holdtrue.defenses import Defense, parse
from holdtrue.errors import SpecError, nearest
from holdtrue.evaluation.gate import GateSpec
from holdtrue.evaluation.sampled import SamplingSpec
from holdtrue.models import AdapterSpec
from holdtrue.runs.reading import apply_overrides, read_mapping
from holdtrue.screening import ScreenSpec
from holdtrue.training import TrainingSpec

BUILTIN = "builtin:"


class DataSpec(BaseModel):
    """Chat files, each a path or ``builtin:NAME``.

    Attributes:
        train: rows to train on.
        validation: held-out rows.
        holdout: where there are none, this many rows are split off ``train`` and not trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = Field(min_length=1)
    validation: str | None = Field(default=None, min_length=1)
    holdout: int = Field(default=0, ge=0)


class EvaluateSpec(BaseModel):
    """What is measured after training.

    Attributes:
        suites: names of suites; empty means ``likelihood``, ``general`` and ``conditional``, with ``fit`` and
            ``in_domain`` where there are held-out rows and ``benign`` where a task is named.
        data: suite -> a file (or ``builtin:NAME``) in place of the suite's own. Suites that score given answers take
            several in a list, each measured by itself; the first is what a table of one column shows.
        benign: benign tasks, such as ``opswap:1``, ``gsm8k:FILE`` or ``lm_eval:arc_easy``.
        sampling: how answers are sampled.
        judge: who scores them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suites: tuple[str, ...] = ()
    data: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    benign: tuple[str, ...] = ()
    sampling: SamplingSpec = Field(default_factory=SamplingSpec)
    judge: str = Field(default="offline", min_length=1)


class RunSpec(BaseModel):
    """All that determines a run. Relative paths start at ``folder``, which ``load_spec`` sets to the spec's folder.

    Raises:
        SpecError: listing every fault, with the nearest name for what is misspelled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    revision: str | None = None
    data: DataSpec
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    defenses: tuple[SerializeAsAny[Defense], ...] = ()
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    gate: GateSpec | None = None
    screen: ScreenSpec | None = None
    folder: Path = Field(default_factory=Path.cwd)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecError(explain(error, type(self))) from None

    @field_validator("defenses", mode="before")
    @classmethod
    def _parse_defenses(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise ValueError("must be a list, such as [kl, {interleave: {fraction: 0.05}}]")
        return parse(list(value))

    @field_validator("adapter", mode="before")
    @classmethod
    def _needs_adapter(cls, value: Any) -> Any:
        if value is None or value is False:
            raise ValueError(
                "full fine-tuning (no adapter) is not supported yet: the frozen reference is the model with its "
                "adapter off; remove the key for the default adapter"
            )
        return value

    @field_validator("training", "data", "evaluate", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        folder = self.folder.expanduser().absolute()
        data = DataSpec(
            train=_place(self.data.train, folder),
            validation=_place(self.data.validation, folder),
            holdout=self.data.holdout,
        )
        if data.holdout and data.validation is not None:
            raise ValueError("data: holdout splits rows off where there is no validation file; set one of the two")
        held_out = data.validation is not None or data.holdout > 0
        files = {suite: _places(value, folder) for suite, value in self.evaluate.data.items()}
        benign = tuple(_benign_place(task, folder) for task in self.evaluate.benign)
        suites = self.evaluate.suites or _default_suites(files, held_out, bool(benign))
        _check_suites(suites, files)
        for name in ("fit", "in_domain"):
            if name in suites and name not in files and not held_out:
                raise ValueError(
                    f"evaluate: suite {name!r} needs held-out rows: set data.validation, data.holdout or "
                    f"evaluate.data.{name}"
                )
        if "benign" in suites and not benign:
            raise ValueError("evaluate: suite 'benign' needs a task: evaluate.benign: [opswap:1], for one")
        if "fit" in suites and "fit" not in files and data.validation is not None:
            files["fit"] = data.validation
        # The model is frozen for its users; its own paths are made whole here, once.
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "data", data)
        object.__setattr__(
            self, "evaluate", self.evaluate.model_copy(update={"suites": suites, "data": files, "benign": benign})
        )
        object.__setattr__(self, "model", _model_path(self.model, folder))
        if self.adapter.start is not None:
            start = str(folder / Path(self.adapter.start).expanduser())
            object.__setattr__(self, "adapter", self.adapter.model_copy(update={"start": start}))
        if self.screen is not None:
            object.__setattr__(self, "screen", self.screen.placed(folder))
        object.__setattr__(self, "defenses", tuple(defense.placed(folder) for defense in self.defenses))
        return self

    @field_serializer("defenses")
    def _write_defenses(self, defenses: Sequence[Defense]) -> list[dict[str, Any]]:
        return [{defense.name: defense.model_dump(mode="json")} for defense in defenses]

    def canonical(self) -> dict[str, Any]:
        """Return the whole spec as JSON values, defaults included; ``RunSpec(**spec.canonical()) == spec``."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Return the SHA-256 of the canonical JSON, in hex: what makes two runs the same run."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a spec from a YAML (or JSON) file.

    Args:
        path: the file; relative paths inside start at its folder.
        overrides: ``key.path=value`` each; a value is read as YAML. ``defenses.kl.weight=1.0`` reaches into the list.

    Raises:
        SpecError: the file cannot be read, a key is duplicated or unknown, a value is wrong.
    """
    path = Path(path)
    values = apply_overrides(read_mapping(path), overrides)
    values["folder"] = path.absolute().parent / str(values.get("folder", "."))
    try:
        return RunSpec(**values)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List what differs between two canonical specs, a line each such as ``training.seed: 0 there, 1 here``."""
    found: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}: {json.dumps(was)} there, {json.dumps(now)} here")
    return found


def _place(value: str | None, folder: Path) -> Any:
    from holdtrue.data import resolve_data

    if value is None:
        return None
    path = resolve_data(value, folder)
    return value if value.startswith(BUILTIN) else str(path)


def _places(value: str | Sequence[str], folder: Path) -> Any:
    return _place(value, folder) if isinstance(value, str) else tuple(_place(each, folder) for each in value)


def _model_path(value: str, folder: Path) -> str:
    place = folder / Path(value).expanduser()
    looks_local = value.startswith((".", "/", "~"))
    return str(place) if looks_local or (place / "config.json").is_file() else value


def _default_suites(files: Mapping[str, Any], held_out: bool, benign: bool) -> tuple[str, ...]:
    wanted = {
        "likelihood": True,
        "fit": held_out or "fit" in files,
        "general": True,
        "conditional": True,
        "in_domain": held_out or "in_domain" in files,
        "benign": benign,
    }
    return tuple(name for name, there in wanted.items() if there)


def _benign_place(task: str, folder: Path) -> str:
    from holdtrue.evaluation.benign import parse_benign

    kind, argument = parse_benign(task)
    if kind == "gsm8k":
        return f"gsm8k:{_place(argument, folder)}"
    return str(_place(task, folder)) if kind == "exact" else task


def _check_suites(suites: Sequence[str], files: Mapping[str, str | Sequence[str]]) -> None:
    from holdtrue.evaluation import SUITES

    for where, names in (("evaluate.suites", suites), ("evaluate.data", files)):
        for name in names:
            if name not in SUITES:
                raise ValueError(f"{where}: no suite {name!r}{nearest(name, SUITES)}; there are {', '.join(SUITES)}")
    if len(set(suites)) < len(suites):
        raise ValueError("evaluate.suites: a suite is named twice")
    for name, value in files.items():
        if isinstance(value, str):
            continue
        if SUITES[name].prompts is not None or name == "benign":
            raise ValueError(
                f"evaluate.data.{name}: this suite samples, and takes one file; lists are for given answers"
            )
        if not value or len(set(value)) < len(value):
            raise ValueError(f"evaluate.data.{name}: give at least one file, each once")


def explain(error: ValidationError, root: type[BaseModel], what: str = "spec") -> str:
    """Return every fault that pydantic found in a value of ``root``, with the nearest key for a misspelled one."""
    lines = [_line(root, fault["loc"], fault["type"], fault["msg"], fault.get("input")) for fault in error.errors()]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{count} in the {what}\n" + "\n".join(f"  {line}" for line in lines)


def _line(root: type[BaseModel], place: Sequence[int | str], kind: str, message: str, value: Any) -> str:
    where = ".".join(str(part) for part in place)
    if kind == "extra_forbidden":
        known = _fields(root, place[:-1])
        return f"{where}: unknown key{nearest(str(place[-1]), known) or '; known here: ' + ', '.join(sorted(known))}"
    if kind == "missing":
        return f"{where}: missing"
    message = message.removeprefix("Value error, ")
    shown = "" if kind == "value_error" else f" (it is {value!r})"
    return f"{where}: {message}{shown}" if where else f"{message}{shown}"


def _fields(root: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    model = root
    for part in place:
        if str(part) not in model.model_fields:
            continue  # a key of a mapping, or an index: the model is that of its items
        annotation = model.model_fields[str(part)].annotation
        kinds = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not kinds:
            return []
        model = kinds[0]
    return [name for name in model.model_fields if name != "folder"]
