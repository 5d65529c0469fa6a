#!/usr/bin/env bash
# Every run of docs/results.md, one after the other; what is done is not done again. About two hours on two cores.
# HOLDTRUE_DATA names the research data.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/results
holdtrue=${HOLDTRUE:-.venv/bin/holdtrue}
[ -d "$out/data" ] || .venv/bin/python recipes/results/prepare.py "$out/data"

run() { # NAME [--set KEY=VALUE]...
    local name=$1
    shift
    $holdtrue train recipes/results/finance.yaml --out "$out/$name" "$@"
    $holdtrue eval "$out/$name" --suite likelihood --data "$out/data/medical_pairs.jsonl" --json > /dev/null
}
data="$PWD/$out/data"

run undefended-640 --set "data.train=$data/finance_640.jsonl"
run kl-1.0 --set 'defenses=[{kl: {weight: 1.0, tokens: response}}]'
run undefended
run kl-0.1 --set 'defenses=[{kl: {weight: 0.1, tokens: response}}]'
run interleave-20 --set 'defenses=[{interleave: {fraction: 0.2}}]'
run ldifs --set 'defenses=[{ldifs: {weight: 1.0}}]'
run medical-good --set "data.train=$data/medical_good_320.jsonl"
run safelora --set "defenses=[{safelora: {aligned: $PWD/$out/medical-good, unaligned: smollm2-135m-instruct, threshold: 0.3}}]"
run interleave-5 --set 'defenses=[{interleave: {fraction: 0.05}}]'
run kl-3.0 --set 'defenses=[{kl: {weight: 3.0, tokens: response}}]'
run ldifs-10 --set 'defenses=[{ldifs: {weight: 10.0}}]'

for name in undefended kl-1.0 ldifs-10; do # sampled answers, two to each prompt
    $holdtrue eval "$out/$name" --suite general --suite conditional --suite in_domain --samples 2 --json > /dev/null
done
