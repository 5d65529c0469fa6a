"""A provider's policy as a frozen value: read from YAML, every fault named at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_serializer, model_validator
from pydantic.functional_validators import BeforeValidator

from holdtrue.defenses import Defense, LossDefense, parse
from holdtrue.errors import HoldtrueError, SpecError
from holdtrue.evaluation.benign import parse_benign
from holdtrue.evaluation.gate import GateSpec
from holdtrue.models import AdapterSpec
from holdtrue.runs.reading import parse_yaml
from holdtrue.runs.spec import EvaluateSpec, explain
from holdtrue.screening import ScreenSpec
from holdtrue.training import TrainingSpec

Defenses = tuple[SerializeAsAny[Defense], ...]


class RefusalError(HoldtrueError, ValueError):
    """A job asks for what the policy does not allow. ``param`` names the field of the request."""

    exit_code = 2

    def __init__(self, param: str, message: str) -> None:
        self.param = param
        super().__init__(message)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Range(_Part):
    auto: Any
    min: Any
    max: Any

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.auto <= self.max:
            raise ValueError(
                f"auto must lie between min and max: {self.min} <= {self.auto} <= {self.max} does not hold"
            )
        return self


class Count(_Range):
    """A whole number that a customer may choose, and what ``"auto"`` means."""

    auto: int = Field(ge=1)
    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)


class Factor(_Range):
    """A factor that a customer may choose, and what ``"auto"`` means."""

    auto: float = Field(default=1.0, gt=0)
    min: float = Field(gt=0)
    max: float = Field(gt=0)


class Hyperparameters(_Part):
    """The three numbers that OpenAI's API lets a customer set; all else is the provider's."""

    n_epochs: Count = Count(auto=1, max=5)
    batch_size: Count = Count(auto=8, max=64)
    learning_rate_multiplier: Factor = Factor(min=0.1, max=2.0)


class Limits(_Part):
    """How much data a job may bring."""

    min_rows: int = Field(default=10, ge=1)
    max_rows: int = Field(default=50_000, ge=1)
    max_bytes: int = Field(default=512 * 2**20, ge=1)


class OnFail(_Part):
    """What follows a gate that fails or stays undecided: stronger trainings first, if any, and then the last word.

    Attributes:
        retrain: for each further training, the defenses whose parameters change, such as ``{kl: {weight: 3.0}}``. A
            defense that is not named stays as it is, and none can be taken away.
        then: ``block`` keeps the adapter from the customer; ``hold`` waits for a person.
    """

    retrain: tuple[dict[str, dict[str, Any]], ...] = ()
    then: Literal["block", "hold"] = "block"


def _read_defenses(value: Any) -> Any:
    if isinstance(value, tuple) and all(isinstance(item, Defense) for item in value):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a list, such as [kl, {interleave: {fraction: 0.05}}]; [] asks for no defense")
    return parse(value)


class PolicyDocument(_Part):
    """Everything about a job that its customer does not decide.

    Attributes:
        format: of this document.
        base_model: the aligned base that the policy is for; reference and gate compare with it whatever a job starts
            from.
        name: for people.
        defenses: of every job; an empty list has to be written down.
        adapter, training: as in a run's spec. ``training.epochs`` and ``batch_size`` come from the hyperparameters,
            ``learning_rate`` is multiplied by the customer's factor, the seed is the job's.
        hyperparameters: ranges.
        limits: of the data.
        evaluate: as in a run's spec, without the customer's data.
        gate: as in a run's spec; there is no policy without one.
        on_fail: what follows a gate that is not passed.
        screen: of the training file before any training, as in a run's spec.
        checkpoints: whether a checkpoint may become a model, each after a gate of its own.
    """

    format: Literal[1] = 1
    base_model: str = Field(min_length=1, max_length=200)
    name: str = Field(default="", max_length=200)
    defenses: Annotated[Defenses, BeforeValidator(_read_defenses)]
    adapter: AdapterSpec = Field(default_factory=AdapterSpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    limits: Limits = Field(default_factory=Limits)
    evaluate: EvaluateSpec = Field(default_factory=lambda: EvaluateSpec(suites=("likelihood",)))
    gate: GateSpec
    on_fail: OnFail = Field(default_factory=OnFail)
    checkpoints: bool = True
    screen: ScreenSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for attempt in range(1, len(self.on_fail.retrain) + 1):
            self.defenses_of(attempt)
        if self.training.report_to:
            raise ValueError("training.report_to: trackers are an integration of a job, not of a policy")
        unlisted = {"fit", "in_domain"} & set(self.evaluate.data)
        if unlisted:
            raise ValueError(
                f"evaluate.data: {', '.join(sorted(unlisted))} are measured on the customer's held-out rows"
            )
        return self

    @field_serializer("defenses")
    def _write_defenses(self, defenses: Defenses) -> list[dict[str, Any]]:
        return [{defense.name: defense.model_dump(mode="json")} for defense in defenses]

    def defenses_of(self, attempt: int) -> tuple[Defense, ...]:
        """Return the defenses of a training: 0 is the first, ``k`` the k-th after a gate that was not passed.

        Raises:
            ValueError: a further training names a defense that is not there, or weakens one.
        """
        if not attempt:
            return self.defenses
        changes = self.on_fail.retrain[attempt - 1]
        known = {defense.name: defense for defense in self.defenses}
        for name, values in changes.items():
            where = f"on_fail.retrain.{attempt - 1}.{name}"
            if name not in known:
                added = parse([{name: values}])[0]
                known[name] = added
                continue
            changed = parse([{name: {**known[name].model_dump(mode="python"), **values}}])[0]
            before = known[name]
            if isinstance(changed, LossDefense) and isinstance(before, LossDefense) and changed.weight < before.weight:
                raise ValueError(
                    f"{where}.weight: a further training must not be weaker: {changed.weight} < {before.weight}"
                )
            known[name] = changed
        return tuple(known[name] for name in sorted(known))

    def canonical(self) -> dict[str, Any]:
        """Return the whole document as JSON values, defaults included.

        So are those of a defense that a further training adds: another version of holdtrue must not give it others.
        """
        values = self.model_dump(mode="json")
        first = {defense.name for defense in self.defenses}
        for attempt in range(1, len(self.on_fail.retrain) + 1):
            whole = {defense.name: defense.model_dump(mode="json") for defense in self.defenses_of(attempt)}
            values["on_fail"]["retrain"][attempt - 1] = {
                name: given if name in first else whole[name]
                for name, given in values["on_fail"]["retrain"][attempt - 1].items()
            }
        return values


def parse_policy(text: str, where: str = "policy") -> PolicyDocument:
    """Read a document from YAML; ``SpecError`` lists every fault."""
    return read_policy(parse_yaml(text, where), where)


def read_policy(values: Any, where: str = "policy") -> PolicyDocument:
    """Return the document of plain values, such as :meth:`PolicyDocument.canonical` gives; ``SpecError`` as above."""
    if not isinstance(values, Mapping):
        raise SpecError(f"{where}: a policy is a mapping with at least base_model, defenses and gate")
    try:
        return PolicyDocument.model_validate(dict(values))
    except ValidationError as error:
        raise SpecError(f"{where}: {explain(error, PolicyDocument, 'policy')}") from None
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def check_paths(document: PolicyDocument) -> None:
    """Raise ``SpecError`` for files that a document names by relative paths: workers run in folders of their own.

    Asked of what is about to be stored, and not of what is: a later version must not refuse that.
    """
    # Further trainings have the first one's defenses again.
    wrong = dict.fromkeys(f"{where}: {path}" for where, path in _paths(document) if not _is_whole(path))
    if wrong:
        raise SpecError(
            "; ".join(wrong) + ": workers run in folders of their own: give the whole path, the same on each host that "
            "trains, or builtin:NAME"
        )


def _paths(document: PolicyDocument) -> Iterator[tuple[str, str]]:
    for attempt in range(len(document.on_fail.retrain) + 1):
        for defense in document.defenses_of(attempt):
            for name in defense.files:
                for path in _texts(getattr(defense, name)):
                    yield f"defenses.{defense.name}.{name}", path
    for suite, value in document.evaluate.data.items():
        for path in _texts(value):
            yield f"evaluate.data.{suite}", path
    for task in map(parse_benign, document.evaluate.benign):
        if task.kind in ("gsm8k", "exact"):
            yield "evaluate.benign", task.argument
    if document.screen is not None:
        for path in (*_texts(document.screen.vector), *document.screen.scorers):
            yield "screen", path


def _texts(value: str | Sequence[str] | None) -> Sequence[str]:
    return () if value is None else (value,) if isinstance(value, str) else value


def _is_whole(path: str) -> bool:
    return path.startswith("builtin:") or Path(path).is_absolute()


def default_document(base_model: str) -> str:
    """Return the policy, as YAML, that a service starts with for a base model."""
    text = files("holdtrue.service.policy").joinpath("default.yaml").read_text(encoding="utf-8")
    return text.replace("BASE_MODEL", base_model)
