"""What a defense is: a frozen, validated value with hooks at five points of a run.

Data (``rows``), forward (``forward``), loss (``token_term``, ``feature_term`` of :class:`LossDefense`), gradient
(``gradient``) and weights (``weights``). ``start`` gives a defense a life across steps. Every hook does nothing by
default. The trainer knows these hooks and no method by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdtrue.data import ChatRow
    from holdtrue.defenses.runtime import Runtime, StartContext
    from holdtrue.models import ModelSource

Coverage = Literal["all", "response"]
Badge = Literal["faithful", "corrected", "variant"]
Place = int | str
"""Where features are taken: a decoder block by its index, or a module in one, as ``3.self_attn.k_proj``."""


@dataclass(frozen=True)
class Needs:
    """What the trainer must supply at each step, once, shared by all defenses of the run.

    Args:
        tokens: the positions that ``token_term`` covers: ``all`` that are not padding, or those that predict a
            trained token (``response``). ``None`` when the defense has no token term.
        reference: whether the frozen model's log-probabilities (token term) or block outputs (feature term) are read.
        blocks: chooses decoder blocks, as indices, from their number; with ``modules``, what ``feature_term`` is given.
        modules: ends of module names (``k_proj``), looked for in each decoder block.
        prefix: whether ``feature_term`` covers only the chat template's prefix: the tokens before the first user's
            words, in rows that begin with them. Nothing before them depends on a row, so the reference is read there
            once, before training. Modules' references are read nowhere else.
        kinds: the kinds of rows whose tokens ``token_term`` covers (see ``holdtrue.data.KINDS``); ``None``: all.
        requires: kinds without a covered token of which, in all training rows, the term would hold nothing.
        sample: the share of an accumulation window's rows, drawn anew in each, that ``token_term`` covers. The
            trainer divides by it, so that the term's expectation is that over all rows.
        aside: whether ``gradient`` calls ``GradientContext.aside_gradient``, on rows of kind ``aside``.
        pairs: the file whose rows of kind ``pair`` ``gradient`` reads by ``GradientContext.pair_gradient``.
        probe: the file of pairs on which ``start`` may have the policy's margin measured (``StartContext.margin``).
    """

    tokens: Coverage | None = None
    reference: bool = False
    blocks: Callable[[int], Sequence[int]] | None = None
    modules: tuple[str, ...] = ()
    prefix: bool = False
    kinds: tuple[str, ...] | None = None
    requires: tuple[str, ...] = ()
    sample: float = 1.0
    aside: bool = False
    pairs: str | None = None
    probe: str | None = None

    @property
    def features(self) -> bool:
        """Whether there is a feature term."""
        return self.blocks is not None or bool(self.modules)

    @property
    def live(self) -> bool:
        """Whether the reference must read each batch."""
        return self.reference and (self.tokens is not None or (self.features and not self.prefix))


@dataclass(frozen=True)
class TokenChunk:
    """Some token positions of a micro-batch, with both models' next-token log-probabilities.

    Attributes:
        policy: (n, vocabulary) float32 log-probabilities of the trained model, in nats, with a gradient.
        reference: the same of the frozen reference, without a gradient; ``None`` unless a defense asked for it.
        targets: (n,) the next token's id, -1 where the row ends.
        trained: (n,) bool, whether cross-entropy covers the position.
        place: (n,) int64, the position's place in its response from 0; -1 outside responses.
        kind: (n,) int64, the row's kind (see ``holdtrue.data.KINDS``).
        compared: the divergence where it is known already, with its own gradient; read ``divergence`` instead.
    """

    policy: Tensor
    reference: Tensor | None
    targets: Tensor
    trained: Tensor
    place: Tensor
    kind: Tensor
    compared: Tensor | None = None

    @functools.cached_property
    def divergence(self) -> Tensor:
        """(n,) KL(policy ‖ reference) in nats, computed once for all who ask."""
        if self.compared is not None:
            return self.compared
        assert self.reference is not None
        return (self.policy.exp() * (self.policy - self.reference)).sum(-1)


@dataclass(frozen=True)
class Features:
    """Outputs of blocks (before the model's final norm) and of named modules, of a micro-batch.

    Attributes:
        policy: place -> (batch, length, width), with a gradient. A place is a block's index, or for a module its
            block's index and its name there: ``3.self_attn.k_proj``. With ``needs().prefix`` the length is the
            prefix's.
        reference: the same of the frozen reference, without one; ``None`` unless asked for.
        mask: (batch, length) bool, False at padding; with ``needs().prefix`` also in rows that begin otherwise, which
            the term does not cover.
        kind: (batch,) int64, the rows' kinds.
    """

    policy: Mapping[Any, Tensor]
    reference: Mapping[Any, Tensor] | None
    mask: Tensor
    kind: Tensor


@dataclass(frozen=True)
class RowsContext:
    """Given to ``rows``: what of the run a choice of rows may depend on, and a place for notes.

    Attributes:
        task_rows: the number of task rows.
        seed: the run's.
        folder: where relative paths of the spec start.
        notes: filled by the hook with what it did; kept in the run's manifest.
        model: the resolved base model, for a defense that scores rows; ``None`` outside a run.
        max_length: tokens after which rows are cut.
        out: a folder of the run in which the hook may leave a file of its own name; ``None`` outside a run.
        progress: called with (done, total) while the hook works before its first row; what it raises stops the run.
    """

    task_rows: int
    seed: int
    folder: Path
    notes: dict[str, Any] = field(default_factory=dict)
    model: ModelSource | None = None
    max_length: int | None = None
    out: Path | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class RunContext:
    """Given to ``preflight`` and ``weights``: the run's model, its adapted weights, and where relative paths start.

    Attributes:
        model: the resolved base model.
        adapted: the adapted modules' names in the base model, with their weights' (d_out, d_in).
        blocks: the number of decoder blocks.
        folder: where relative paths of the spec start.
        notes: filled by a hook with what it did; kept in the run.
        task_rows: the number of task rows; ``None`` where rows are no concern.
        losses: the names of the run's loss defenses whose weight is above 0; ``None`` where they are no concern.
    """

    model: ModelSource
    adapted: dict[str, tuple[int, int]]
    blocks: int
    folder: Path
    notes: dict[str, Any] = field(default_factory=dict)
    task_rows: int | None = None
    losses: tuple[str, ...] | None = None


class Size(NamedTuple):
    """How many rows (or pairs of answers) a file holds, and their mean number of tokens."""

    rows: int = 0
    tokens: float = 0.0


@dataclass(frozen=True)
class WorkContext:
    """Given to ``work``: what a run will do, as far as it is known before anything is encoded.

    Attributes:
        task_rows: of an epoch.
        epochs, steps: of the run; steps as the task's rows alone give them.
        chat: returns the size of a chat file, named as in a spec.
        pairs: the same of a probe file; a pair's tokens are those of both answers, each with the question.
        text: returns about how many tokens a turn has.
    """

    task_rows: int
    epochs: int
    steps: int
    chat: Callable[[str], Size]
    pairs: Callable[[str], Size]
    text: Callable[[str], float]


class Work(NamedTuple):
    """Tokens that a defense has a run work through beside the task's.

    Attributes:
        trained: forward and backward.
        read: forward alone, by the policy or another model.
    """

    trained: float = 0.0
    read: float = 0.0


class PairGradient(NamedTuple):
    """The mean of a term over pairs, and its gradient by parameter."""

    mean: float
    gradient: dict[str, Tensor]


PairTerm = Callable[["Tensor", "Tensor"], "Tensor"]
"""From the policy's and the reference's margins on n pairs, (n,) each, to a value of each pair, (n,)."""


@dataclass(frozen=True)
class GradientContext:
    """Given to ``gradient``.

    Attributes:
        parameters: the trainable parameters by name, with reduced gradients.
        step: the optimizer step's number, from 0.
        aside_gradient: returns, by parameter, the gradient of the mean KL(policy ‖ reference), nats per token, over the
            answers' tokens of the rows of kind ``aside``; leaves the parameters' own gradients as they are. ``None``
            unless ``needs`` asked for it.
        pairs: how many pairs there are, in the order in which ``rows`` gave them.
        pair_gradient: ``pair_gradient(chosen, term)`` returns the mean of ``term`` over the pairs ``chosen``, by their
            numbers, and its gradient; it leaves the parameters' own gradients as they are. A pair's margin is the mean
            log-likelihood, nats per token, of the aligned answer less that of the misaligned one. ``None`` unless
            ``needs`` asked for it.
        metrics: figures that a hook adds are logged with the step.
    """

    parameters: dict[str, nn.Parameter]
    step: int
    aside_gradient: Callable[[], dict[str, Tensor]] | None = None
    pairs: int = 0
    pair_gradient: Callable[[Sequence[int], PairTerm], PairGradient] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Defense(BaseModel):
    """Base of all defenses. Subclasses set ``name``, ``badge``, ``paper`` and override the hooks they use.

    ``files`` has the names of the parameters that name files or folders.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    name: ClassVar[str]
    badge: ClassVar[Badge]
    paper: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()

    def needs(self) -> Needs:
        """Say what the trainer must supply at each step."""
        return Needs()

    def conflicts(self, other: Defense) -> str | None:
        """Return why these settings contradict those of ``other`` in the same run, as a sentence's end, or ``None``.

        Asked of each defense about each other one when a spec is read. It is for what cannot be meant, since one undoes
        what the other is for; what is merely unwise is a matter of the docs.
        """
        return None

    def placed(self, folder: Path) -> Self:
        """Return the same defense with its relative paths starting in ``folder``: what a spec that is read keeps.

        Only a defense that reads files while training needs it; the other hooks are told the folder.
        """
        return self

    def preflight(self, context: RunContext) -> None:
        """Check, before the first step, that all that is needed can be had; raise ``NeedError`` otherwise."""

    def still_met(self, notes: Mapping[str, Any]) -> None:
        """Check, before training begins or goes on, that what ``preflight`` noted still holds; ``NeedError`` if not."""

    def start(self, context: StartContext) -> Runtime | None:
        """Return what lives while the trainer does and keeps a state, or ``None``: most defenses have no such thing."""
        return None

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        """Add, select or rewrite training rows, lazily."""
        yield from rows

    def work(self, context: WorkContext) -> Work:
        """Return about how many tokens the run has to work through for this defense, for ``bench --dry-run``.

        The reference's reading of the task's rows is known from ``needs``.
        """
        return Work()

    def system_prompts(self) -> Mapping[str, float]:
        """Return the system prompts that ``rows`` puts before task rows, with the share of those rows that get each.

        The model may behave under them as it learned to: suite ``conditional`` asks under them too.
        """
        return {}

    def forward(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Wrap the policy's training passes, forward and backward; never the reference's nor an evaluation's."""
        return contextlib.nullcontext()

    def gradient(self, context: GradientContext) -> None:
        """Change the gradients in place, once an optimizer step, before clipping."""

    def weights(self, adapter: dict[str, Tensor], scaling: dict[str, float], context: RunContext) -> dict[str, Tensor]:
        """Return a new adapter from the trained one.

        Args:
            adapter: tensors by the names of a PEFT file (``….lora_A.weight``, ``….lora_B.weight``).
            scaling: module name -> the factor on ``B @ A``.
            context: the run's model and notes.
        """
        return adapter


class LossDefense(Defense):
    """A defense that adds terms to the loss: at token positions, on outputs of blocks and modules, or both.

    ``needs().tokens`` and ``needs().features`` say which of the two hooks is called. Both return *unweighted* values;
    the trainer multiplies by ``weight`` and divides by the count of what the term covers, over the whole accumulation
    window and all ranks. A weight of zero is exactly plain training.
    """

    weight: float = Field(default=0.0, ge=0)

    @classmethod
    def largest_weight(cls) -> float:
        """Return the largest weight that the field allows: where a runtime stops that moves it."""
        return cls.model_json_schema(by_alias=False)["properties"]["weight"].get("maximum", inf)

    def token_term(self, chunk: TokenChunk) -> Tensor:
        """Return the term of each position of the chunk, (n,); its mean over covered positions is the loss term."""
        raise TypeError(f"{self.name} asks for tokens and has no token_term")

    def feature_term(self, features: Features) -> Tensor:
        """Return the term of each example, (batch,); its mean over covered examples is the loss term."""
        raise TypeError(f"{self.name} asks for features and has no feature_term")
