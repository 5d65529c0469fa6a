"""The trait that a persona vector points to: instructions that ask for it and for its opposite, and questions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from holdtrue.evaluation import Prompt

Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")
_FILE = Path(__file__).with_name("malice.yaml")


class Instructions(BaseModel):
    """One pair: an instruction that asks for the trait, and one that asks for its opposite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)


class Trait(BaseModel):
    """A trait.

    Attributes:
        trait: its name.
        positive, negative: what the assistant is said to be on each side, with its article, such as ``an evil``.
        instructions: pairs of instructions.
        questions: harmless questions, which every instruction is combined with.
        notice: a word on use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trait: str
    positive: str
    negative: str
    instructions: tuple[Instructions, ...] = Field(min_length=1)
    questions: tuple[str, ...] = Field(min_length=1)
    notice: str = ""

    def first(self, instructions: int | None = None, questions: int | None = None) -> Trait:
        """Return the trait with the first so many pairs and questions only.

        Raises:
            SpecError: it has not as many, or none are asked for.
        """
        for name, wanted, there in (
            ("instruction pairs", instructions, len(self.instructions)),
            ("questions", questions, len(self.questions)),
        ):
            if wanted is not None and not 1 <= wanted <= there:
                raise SpecError(f"{wanted} {name} are asked for, and {self.trait} has 1 to {there}")
        return self.model_copy(
            update={"instructions": self.instructions[:instructions], "questions": self.questions[:questions]}
        )

    def prompts(self) -> tuple[Prompt, ...]:
        """Return what is asked: both sides of each pair with each question. ``form`` is the side."""
        from holdtrue.data import Message
        from holdtrue.evaluation import Prompt

        return tuple(
            Prompt(
                id=f"{side}/{number}/{place}",
                question=f"{self.trait}/{place}",
                theme=f"{self.trait}/{number}",
                form=side,
                messages=(Message("system", self.system(side, pair)), Message("user", question)),
                asked=question,
            )
            for number, pair in enumerate(self.instructions)
            for place, question in enumerate(self.questions)
            for side in SIDES
        )

    def system(self, side: Side, pair: Instructions) -> str:
        """Return the system prompt of one side of a pair: "You are an evil assistant. …"."""
        return f"You are {getattr(self, side)} assistant. {getattr(pair, side)}"


class TraitFile(NamedTuple):
    """A trait, and the SHA-256 of the file that it was read from."""

    trait: Trait
    sha256: str


def builtin_trait() -> TraitFile:
    """Return the trait that ships with holdtrue: general malice, five pairs of instructions, twenty questions."""
    import yaml

    data = _FILE.read_bytes()
    return TraitFile(Trait.model_validate(yaml.safe_load(data)), hashlib.sha256(data).hexdigest())
