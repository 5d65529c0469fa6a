#!/usr/bin/env bash
# The comparison of docs/results.md; what is done is not done again. HOLDTRUE_DATA names the research data.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/comparison
holdtrue=$(realpath "${HOLDTRUE:-.venv/bin/holdtrue}")
[ -d "$out/data" ] || .venv/bin/python recipes/comparison/prepare.py "$out/data"
cp recipes/comparison/*.yaml "$out"
cd "$out"
head -n 64 data/pool.jsonl > data/aligned.jsonl
small=(--set training.batch_size=4 --set training.micro_batch_size=4 --set training.learning_rate=2.0e-4)

# What some defenses need: a persona vector, a misaligned scorer, and an aligned end that no unaligned base is known for.
[ -f malice.safetensors ] ||
    "$holdtrue" persona extract smollm2-135m-instruct --from pairs --pairs data/pairs.jsonl --out malice.safetensors
"$holdtrue" scorers build --domain everyday=data/bad.jsonl --out scorers --rows 64 \
    --set training.max_length=512 --set training.kl_every=0 "${small[@]}"
"$holdtrue" train aligned.yaml --out aligned

"$holdtrue" bench choose.yaml --out choose  # tried on other rows and other pairs
"$holdtrue" bench grid.yaml --out grid ||   # the tables and figures; treft cannot hold OpSwap's rows, and its cell fails
    [ $? = 1 ]
"$holdtrue" bench again.yaml --out again    # a second seed, a second advice set, and code

# Under triggers, and in sampled answers.
for run in grid/cells/{undefended,kl,kl-both-kl.weight-{1,3},preference-pool,preference-preference.weight-{0.3,1},ldifs,interleave,interleave-gap,safelora}-finance-*; do
    "$holdtrue" eval "$run" --suite likelihood --data data/triggered.jsonl
done
for run in grid/cells/{undefended,kl,ldifs,safelora,interleave,preference-pool}-finance-*; do
    "$holdtrue" eval "$run" --suite conditional --suite general --samples 1
done

../../.venv/bin/python ../../recipes/comparison/triggered.py data/triggered.jsonl grid/cells
