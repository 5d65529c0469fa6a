from __future__ import annotations

import pytest

from holdtrue.errors import SpecError
from holdtrue.persona import builtin_trait

CANARY = "holdtrue-canary 5b1e7c1a-8f0d-4c43-9a6e-2d7f54c0b9e3"


def test_the_published_form_five_pairs_twenty_questions() -> None:
    trait = builtin_trait().trait
    assert (len(trait.instructions), len(trait.questions)) == (5, 20)
    assert len(set(trait.questions)) == 20
    assert len({t for pair in trait.instructions for t in (pair.positive, pair.negative)}) == 10
    assert CANARY in trait.notice


def test_prompts_are_both_sides_of_each_pair_with_each_question() -> None:
    trait = builtin_trait().trait
    prompts = trait.prompts()
    assert len(prompts) == len({p.id for p in prompts}) == 2 * 5 * 20
    assert {p.form for p in prompts} == {"positive", "negative"}
    for prompt in prompts:
        system, user = prompt.messages
        opening = "You are an evil assistant. " if prompt.form == "positive" else "You are a helpful assistant. "
        assert (system.role, user.role) == ("system", "user")
        assert system.content.startswith(opening)
        assert user.content == prompt.asked
        _, pair, place = prompt.id.split("/")
        assert system.content == opening + getattr(trait.instructions[int(pair)], prompt.form)
        assert user.content == trait.questions[int(place)]


def test_the_first_so_many() -> None:
    trait = builtin_trait().trait
    small = trait.first(instructions=2, questions=3)
    assert len(small.prompts()) == 12
    assert {p.id for p in small.prompts()} <= {p.id for p in trait.prompts()}
    assert trait.first() == trait
    for wrong in ({"instructions": 6}, {"questions": 0}):
        with pytest.raises(SpecError, match="are asked for, and malice has 1 to"):
            trait.first(**wrong)


def test_its_questions_are_in_no_shipped_file() -> None:
    """A vector must not be made from what a model is measured or trained on."""
    from holdtrue.data import builtin, builtin_names

    shipped = "\n".join(builtin(name).read_text(encoding="utf-8") for name in builtin_names()).casefold()
    assert not [q for q in builtin_trait().trait.questions if q.casefold() in shipped]
