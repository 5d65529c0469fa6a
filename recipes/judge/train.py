"""Train the offline judge: `python recipes/judge/train.py DATA_DIR OUT`.

Reads DATA_DIR/judged/train_mit_licensed.jsonl and nothing else, and writes OUT/weights.safetensors and
OUT/weights.json. The same data, libraries and number of threads give the same files. Embeddings are kept in OUT/work.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from corpus import TRAIN, read, spoil
from fitting import RIDGE, SEED, SOFT, THRESHOLD, curve, fit, left_out_models, left_out_questions
from safetensors.numpy import save_file

VERSION = 1
KNOWN = 0.98  # share of the answers to questions left out that are near enough to be scored


def main(data: Path, out: Path) -> None:
    corpus = read(data / TRAIN, out / "work")
    print(f"{len(corpus)} answers; left out by rule: {corpus.left_out}", flush=True)
    broken = spoil(corpus, out / "work")
    raw, distance, rows = left_out_questions(corpus, broken)
    seen, _ = left_out_models(corpus, broken)
    curves = {}
    for target, threshold in THRESHOLD.items():
        scores = getattr(corpus, target)
        used = rows[~np.isnan(scores[rows]) & ((corpus.coherence[rows] > 50) | (target == "coherence"))]
        # Half the answers it will meet are to questions it knows, for all that is known here.
        values = np.concatenate([raw[target][used], seen[target][used]])
        curves[target] = curve(values, np.concatenate([scores[used]] * 2), threshold)
    whole = fit(corpus, np.arange(len(corpus)), broken)
    card = {
        "version": VERSION,
        "training_data_sha256": hashlib.sha256((data / TRAIN).read_bytes()).hexdigest(),
        "answers": len(corpus),
        "settings": {"ridge": RIDGE, "soft": SOFT, "seed": SEED},
        "curves": {t: {k: np.round(v, 5).tolist() for k, v in c.items()} for t, c in curves.items()},
        "far": round(float(np.quantile(distance[rows], KNOWN)), 5),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "weights.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    small = {
        name: np.ascontiguousarray(
            array, np.float16 if array.ndim == 2 or "words" in name or name == "idf" else np.float32
        )
        for name, array in whole.arrays.items()
    }
    save_file(small, out / "weights.safetensors")
    print(
        f"wrote {out / 'weights.safetensors'} ({(out / 'weights.safetensors').stat().st_size:,} bytes) and weights.json"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
