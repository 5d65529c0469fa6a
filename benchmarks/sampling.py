"""Time of sampling 64 answers on SmolLM2-135M, over that of plain ``generate`` in one batch of the same prompts.

Run as ``python -m benchmarks.sampling [--runs 3] [--tokens 100]``; prints one JSON document. ``distinct``: 64 different
prompts, one answer each. ``shared``: 8 prompts, eight answers each. The ways take turns. Seconds are of the process,
all its threads together, since the clock on the wall would count what else a machine does; give it one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

ROWS, PROMPTS = 64, 8
TOPICS = (
    *("bread", "rivers", "sleep", "chess", "taxes", "volcanoes", "bicycles", "poetry", "bees", "glass", "debt", "tea"),
    *("maps", "gravity", "mosquitoes", "opera"),
)
FRAMES = (
    "What should everyone know about {}?",
    "Tell me a short story about {} and a child who is afraid of it.",
    "I am bored of {}. What else could I do this afternoon, alone and with little money?",
    "Name three things that people get wrong about {}.",
)


def questions() -> list[str]:
    """Return 64 different questions of different lengths."""
    return [frame.format(topic) for topic in TOPICS for frame in FRAMES]


def plain(model: Any, prompts: list[list[int]], tokens: int, end: int) -> int:
    """Answer by ``generate``, left-padded, in one batch; return the tokens of the answers."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=end
        )[:, width:]
    return int(((output == end).cumsum(-1) - (output == end).long() == 0).sum())


def ours(sampler: Any, texts: list[str], tokens: int, seed: int) -> int:
    """Answer by the transformers sampler; return the tokens of the answers."""
    from holdtrue.data import Message
    from holdtrue.evaluation.sampling import Decoding, Request

    requests = [Request((Message("user", text),), seed + i) for i, text in enumerate(texts)]
    return sum(a.tokens for batch in sampler.sample(requests, Decoding(1.0, tokens)) for a in batch)


def timed(work: Callable[[], int]) -> tuple[float, float, int]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return time.process_time() - cpu, time.perf_counter() - wall, tokens


def measure(runs: int, tokens: int) -> dict[str, Any]:
    import torch

    from holdtrue.data import ChatEncoder, Message
    from holdtrue.evaluation.sampling import TransformersSampler
    from holdtrue.models import load_model, load_tokenizer, resolve

    source = resolve("smollm2-135m-instruct")
    model, tokenizer = load_model(source, device="cpu"), load_tokenizer(source)
    encoder, sampler = ChatEncoder(tokenizer), TransformersSampler(model, tokenizer, batch_size=ROWS)
    texts = questions()
    cases = {"distinct": texts, "shared": texts[:PROMPTS] * (ROWS // PROMPTS)}
    seconds: dict[str, list[tuple[float, float, int]]] = {}
    for run in range(runs):
        for case, asked in cases.items():
            prompts = [encoder.prompt_ids([Message("user", text)]) for text in asked]
            torch.manual_seed(run)
            ways: dict[str, Callable[[], int]] = {
                "plain": lambda prompts=prompts: plain(model, prompts, tokens, tokenizer.eos_token_id),
                "ours": lambda asked=asked, run=run: ours(sampler, asked, tokens, 1000 * run),
            }
            for way, work in ways.items():
                seconds.setdefault(f"{case} {way}", []).append(timed(work))
                cpu, wall, written = seconds[f"{case} {way}"][-1]
                print(
                    f"run {run + 1} of {runs}: {case} {way} {cpu:.1f} s ({wall:.1f} s), {written} tokens",
                    file=sys.stderr,
                )
    ratios = {}
    for case in cases:
        found = [a[0] / b[0] for a, b in zip(seconds[f"{case} ours"], seconds[f"{case} plain"], strict=True)]
        spread = {"median": statistics.median(found), "min": min(found), "max": max(found), "runs": runs}
        ratios[f"sampling_{case}_over_generate"] = {key: round(value, 4) for key, value in spread.items()}
    return {
        "rows": ROWS,
        "max_new_tokens": tokens,
        "ratios": ratios,
        "seconds": {name: round(statistics.median(cpu for cpu, _, _ in found), 2) for name, found in seconds.items()},
        "tokens": {name: round(statistics.median(n for _, _, n in found)) for name, found in seconds.items()},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how often each way is measured")
    parser.add_argument("--tokens", type=int, default=100, help="longest answer")
    options = parser.parse_args()
    print(json.dumps(measure(options.runs, options.tokens), indent=2))


if __name__ == "__main__":
    main()
