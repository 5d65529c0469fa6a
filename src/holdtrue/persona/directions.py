"""Directions in which a tuned model's hidden states differ from its base's, for projecting them away in training.

After CAFT, Casademunt et al. 2025 (arXiv 2507.16795); a variant: nobody looks at the directions and chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from holdtrue.errors import RunError, SpecError
from holdtrue.persona.extract import Loaded
from holdtrue.persona.states import Progress, answer_batches
from holdtrue.scoring import final_hidden, scoring_mode
from holdtrue.training.reference import captured_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from holdtrue.data import ChatRow
    from holdtrue.models import VectorFile

RELATIVE_FLOOR = 1e-6
"""Directions that carry less than this part of the strongest one's energy are rounding, and are left out."""


def extract_directions(
    loaded: Loaded,
    adapter: Path,
    rows: Sequence[ChatRow],
    out: str | Path,
    *,
    components: int,
    material: dict[str, str],
    blocks: Sequence[int] | None = None,
    trait: str = "what tuning changed",
    progress: Progress | None = None,
) -> VectorFile:
    """Write the strongest directions of d = h(tuned) − h(base) over the answers' tokens, for each block.

    They are the first eigenvectors of the mean of d dᵀ, which is *not* centered: a shift that all answers share is what
    tuning typically does, and would be lost. Each block takes width² numbers of float64 while they are made.

    Args:
        loaded: the base model; the adapter is put on it and stays there.
        adapter: the folder of the tuned model's adapter.
        rows: chat rows whose answers are read.
        out: the safetensors file to write, with a (k, width) tensor for each block, the strongest direction first.
        components: k; fewer where the difference has fewer dimensions.
        material: SHA-256 by name of adapter and rows, for the record.
        blocks: indices; all by default.
        trait: what the directions stand for, for the record.
        progress: called with (sequences done, sequences there are).

    Raises:
        SpecError: a block that the model does not have, or more components than its width.
        RunError: the tuned model's states are the base's, no answer fits, or the file cannot be written.
    """
    import torch

    from holdtrue.models import VectorInfo, causal_lm, decoder_blocks, load_adapter, write_vectors

    count = len(decoder_blocks(loaded.model))
    width = causal_lm(loaded.model).config.get_text_config(decoder=True).hidden_size
    chosen = sorted(set(range(count) if blocks is None else blocks))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise SpecError(f"blocks {chosen} are asked for, and {loaded.source.name} has 0 to {count - 1}")
    if not 1 <= components <= width:
        raise SpecError(f"components is {components}; it should be 1 to {width}, the width of {loaded.source.name}")
    model = load_adapter(causal_lm(loaded.model), adapter)
    tuned = loaded._replace(model=model)
    moments = torch.zeros(len(chosen), width, width, dtype=torch.float64)
    tokens = 0
    for difference in state_differences(tuned, rows, chosen, progress):
        moments += (difference.transpose(1, 2) @ difference).cpu()
        tokens += difference.shape[1]
    if not tokens:
        raise RunError(f"no answer is left to read: all are beyond what {loaded.source.name} holds")
    found = {index: strongest(moment, components) for index, moment in zip(chosen, moments / tokens, strict=True)}
    if empty := [index for index, directions in found.items() if not len(directions)]:
        raise RunError(
            f"{adapter}: at block {empty[0]} the tuned model's states are the base's; leave such blocks out, or name "
            "an adapter that was trained"
        )
    info = VectorInfo(
        kind="directions",
        model=loaded.source.name,
        revision=loaded.source.revision,
        blocks=count,
        width=width,
        source="differences",
        trait=trait,
        material=material,
        counts={"rows": len(rows), "tokens": tokens},
        settings={"components": components},
        version=version("holdtrue"),
    )
    return write_vectors(out, found, info)


def state_differences(
    tuned: Loaded, rows: Sequence[ChatRow], blocks: Sequence[int], progress: Progress | None = None
) -> Iterator[Tensor]:
    """Yield h(tuned) − h(base) at answers' tokens, a batch at a time: (blocks, tokens, width) float64."""
    import torch

    from holdtrue.models import without_adapter

    with scoring_mode(tuned.model) as lm:
        for batch in answer_batches(lm, tuned.encoder(), rows, 1024, progress):
            with captured_blocks(lm, blocks) as after:
                final_hidden(lm, batch.input_ids)
            with without_adapter(tuned.model), captured_blocks(lm, blocks) as before:
                final_hidden(lm, batch.input_ids)
            yield torch.stack([(after[i].double() - before[i].double())[batch.answer] for i in blocks])


def strongest(moment: Tensor, components: int) -> Tensor:
    """Return the first eigenvectors of a symmetric (width, width) matrix as rows, strongest first, (k, width)."""
    import torch

    energy, vectors = torch.linalg.eigh(moment)
    order = torch.argsort(energy, descending=True)[:components]
    real = order[(energy[order] > RELATIVE_FLOOR * energy.max()) & (energy[order] > 0)]
    return vectors[:, real].T
