"""Judges: what scores an answer's alignment and coherence, by name."""

from __future__ import annotations

from pathlib import Path

from holdtrue.errors import SpecError, nearest
from holdtrue.evaluation.judges.budget import Budget, Estimate, Prices
from holdtrue.evaluation.judges.cache import CachedJudge
from holdtrue.evaluation.judges.port import Exchange, Judge, Label, Verdict
from holdtrue.models.store import cache_root

KINDS = {
    "offline": "a small classifier that ships with holdtrue: no network, no cost (the default)",
    "local:MODEL": "a language model in this process, such as local:smollm2-135m-instruct",
    "openai:MODEL": "a language model behind an OpenAI-compatible endpoint, such as openai:gpt-4o",
}
"""The judges that can be named, with what they are."""

__all__ = [
    "KINDS",
    "Budget",
    "CachedJudge",
    "Estimate",
    "Exchange",
    "Judge",
    "Label",
    "Prices",
    "Verdict",
    "load_judge",
]


def load_judge(
    name: str = "offline",
    *,
    cache: Path | None = None,
    device: str | None = None,
    base_url: str | None = None,
    concurrency: int = 16,
    requests_per_minute: float | None = None,
    budget: Budget | None = None,
    prices: Prices | None = None,
) -> CachedJudge:
    """Return the judge of a name, with its verdicts kept on disk.

    Args:
        name: one of ``KINDS``.
        cache: folder for verdicts; by default ``judgements`` in holdtrue's cache folder.
        device: for ``local``.
        base_url, concurrency, requests_per_minute, budget, prices: for ``openai``, see
            :class:`~holdtrue.evaluation.judges.openai.OpenAIJudge`.

    Raises:
        SpecError: there is no such judge, an extra or a key is missing, or an argument is of no use to this judge.
        RunError: its files cannot be read.
    """
    kind, colon, model = name.partition(":")
    if (kind != "offline" or colon) and (kind not in ("local", "openai") or not model):
        missing = f"; give a model, as in {kind}:MODEL" if kind in ("local", "openai") else ""
        raise SpecError(f"unknown judge {name!r}{missing or nearest(name, KINDS)}; known: {', '.join(KINDS)}")
    useless = {"device": device if kind != "local" else None}
    if kind != "openai":
        useless |= {
            "base_url": base_url,
            "requests_per_minute": requests_per_minute,
            "budget": budget,
            "prices": prices,
        }
    if given := [option for option, value in useless.items() if value is not None]:
        raise SpecError(f"the judge {name} has no use for {', '.join(given)}")
    judge: Judge
    if kind == "openai":
        from holdtrue.evaluation.judges.openai import OpenAIJudge

        judge = OpenAIJudge(
            model,
            base_url=base_url,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            budget=budget,
            prices=prices,
        )
    elif kind == "local":
        from holdtrue.evaluation.judges.local import LocalJudge

        judge = LocalJudge(model, device=device)
    else:
        from holdtrue.evaluation.judges.offline import OfflineJudge

        judge = OfflineJudge()
    return CachedJudge(judge, cache or cache_root() / "judgements")
