"""A model card in Hugging Face's format, written from the receipt alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2

TEMPLATE = "card.md.j2"


def model_card(statement: Mapping[str, Any], *, license_name: str | None = None) -> str:
    """Return the text of a ``README.md`` for the adapter that a receipt's statement is about.

    Args:
        statement: as :func:`holdtrue.service.evidence.receipt.build` makes it.
        license_name: of the base model; left out where it is not known.

    Raises:
        ValueError: the statement is not one that this version makes.
    """
    from huggingface_hub import ModelCardData

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    text = files("holdtrue.service.evidence").joinpath(TEMPLATE).read_text(encoding="utf-8")
    try:
        predicate = statement["predicate"]
        header = ModelCardData(
            base_model=predicate["base"]["name"],
            library_name="peft",
            license=license_name,
            pipeline_tag="text-generation",
            tags=["holdtrue", *(f"defense:{each['name']}" for each in predicate["defenses"])],
        )
        body = environment.from_string(text).render(subject=statement["subject"][0], **predicate)
    except (LookupError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise ValueError(f"the receipt lacks what a card says: {error}") from error
    return f"---\n{header.to_yaml()}\n---\n\n{body}"
