#!/usr/bin/env bash
# Source-Shielded Updates, end to end: source model, masks, continued pre-training, evaluation, report.
#
#   bash run_all.sh ne                                  Nepali (or ky am ha ig)
#   PROFILE=paper bash run_all.sh ne                    OLMo-2-7B and 200M tokens, as published: one large GPU, the hub
#   METHODS="ssu-wanda hft gmt fft" bash run_all.sh ne  any methods of the paper; README.md has the list
#   RATIOS="0.25 0.5 0.75" bash run_all.sh ne           several freezing ratios, as in Figure 2
#   TASKS=bpb bash run_all.sh ne                        bits per byte alone, a third of the evaluation's time
#   COMPACT=1 bash run_all.sh ne                        train.py --compact wherever a mask has columns or whole matrices
#   PROFILE=paper bash run_all.sh ne --dry-run          what that would download, need and take; does it fit here?
#   MODEL=folder-or-hub-name DATA_DIR=folder STEPS=200 SEED=43 RUNS=runs/mine bash run_all.sh ne
#
# What is done already with the same settings is skipped; what was interrupted goes on; what changed is made anew.
set -euo pipefail
cd "$(dirname "$0")"
fail() { echo "run_all.sh: error: $*" >&2; exit 2; }
case "${1:-}" in ne|ky|am|ha|ig) lang=$1 ;; *)
    echo "usage: bash run_all.sh LANG, one of: ne (Nepali), ky (Kyrgyz), am (Amharic), ha (Hausa), ig (Igbo)" >&2; exit 2 ;;
esac
dry_run=${2:-}
[ -z "$dry_run" ] || [ "$dry_run" = --dry-run ] || fail "$dry_run: the only option is --dry-run"
gpu=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1) || true  # MiB
[[ $gpu =~ ^[0-9]+$ ]] || gpu=0
if [ -n "${PROFILE:-}" ]; then why="as asked"
elif [ -n "${MODEL:-}${DATA_DIR:-}" ]; then PROFILE=embedded why="MODEL or DATA_DIR is given"
elif [ "$gpu" -lt 130000 ]; then PROFILE=embedded why="no GPU with the 130 GB that a 7B model takes here"
elif ! "${PYTHON:-python3}" -c 'import os, urllib.request as u
u.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=9)' 2>/dev/null
then PROFILE=embedded why="the hub does not answer"
else PROFILE=paper why="a GPU with $gpu MiB, and the hub answers"; fi
case $PROFILE in
    embedded) DATA_DIR=${DATA_DIR:-data/embedded} MODEL=${MODEL:-data/embedded/model} RUNS=${RUNS:-runs}
        CALIBRATION=${CALIBRATION:-$DATA_DIR/en/calibration.jsonl} NUM_SAMPLES=${NUM_SAMPLES:-32} calibration_len=512
        TASKS=${TASKS:-bpb,mcq,mt,chat} STEPS=${STEPS:-32} batch_size=8 save_every=16
        what="$MODEL, $STEPS steps, 5 to 8 minutes a method with the default model on two cores" ;;
    paper) DATA_DIR=${DATA_DIR:-data/paper} MODEL=${MODEL:-allenai/OLMo-2-1124-7B-Instruct}
        RUNS=${RUNS:-runs/${MODEL##*/}} CALIBRATION=${CALIBRATION:-tulu} NUM_SAMPLES=${NUM_SAMPLES:-500}
        TASKS=${TASKS:-mt,sum,mrc,mmlu,ifeval,gsm8k,ae2,codemix} STEPS=${STEPS:-12208} batch_size=32 save_every=500 calibration_len=2048
        what="$MODEL, $STEPS steps on MADLAD-400, hours a method: see below" ;;
    *) fail "PROFILE=$PROFILE: embedded or paper" ;;
esac
METHODS=${METHODS:-fft ssu-wanda} RATIOS=${RATIOS:-${RATIO:-0.5}} SEED=${SEED:-42} FLORES=${FLORES:-ungated}
[[ $FLORES =~ ^(un)?gated$ ]] || fail "FLORES=$FLORES: gated or ungated"
[[ ${LANGUAGE_ID:=glotlid} =~ ^(glotlid|script)$ ]] || fail "LANGUAGE_ID=$LANGUAGE_ID: glotlid or script"
case ${COMPACT:-0} in 0) COMPACT= ;; 1) COMPACT=" --compact" ;; *) fail "COMPACT=$COMPACT: 0 or 1" ;; esac
known="fft adalora hft gmt ssu-rand ssu-mag ssu-wanda ssu-sparsegpt ssu-fim ssu-wanda-row ssu-wanda-element \
lota lota-90 lota-50 s2ft-down s2ft-down-output"
[[ $METHODS = *[![:space:]]* && $RATIOS = *[![:space:]]* ]] || fail "METHODS and RATIOS must name at least one each"
for method in $METHODS; do [[ " $known " = *" $method "* ]] || fail "METHODS has $method: choose from $known"; done
for ratio in $RATIOS; do
    [[ $ratio =~ ^(0(\.[0-9]+)?|1(\.0+)?)$ ]] || fail "RATIOS has $ratio: each must lie between 0 and 1"
    [[ " $METHODS " != *" gmt "* || $ratio != 1* ]] || fail "RATIOS has $ratio: gmt cannot drop all gradients"
done
RATIOS=$(LC_ALL=C printf '%g ' $RATIOS)
[[ $STEPS =~ ^[1-9][0-9]*$ && $SEED =~ ^[0-9]+$ && $NUM_SAMPLES =~ ^[1-9][0-9]*$ ]] ||
    fail "STEPS=$STEPS, SEED=$SEED and NUM_SAMPLES=$NUM_SAMPLES must be whole numbers"
[[ "$RUNS$DATA_DIR$MODEL$CALIBRATION" != *[[:space:]]* ]] || fail "RUNS, DATA_DIR, MODEL and CALIBRATION: no spaces"
[[ ,$TASKS =~ ^(,(bpb|mcq|mt|sum|mrc|mmlu|chat|ifeval|gsm8k|ae2|codemix))+$ ]] ||
    fail "TASKS has $TASKS: some of bpb,mcq,mt,sum,mrc,mmlu,chat,ifeval,gsm8k,ae2,codemix"
if [ $PROFILE = paper ] && [[ ,$TASKS =~ ,(bpb|chat) ]]; then
    fail "TASKS has $TASKS: bpb and chat need held-out text, which the paper's data have not"
fi
[[ -d $MODEL || $MODEL = data/embedded/model || $MODEL =~ ^[[:alnum:]_-]+/[[:alnum:]._-]+$ ]] ||
    fail "MODEL=$MODEL: no such folder"
best=fp32  # a processor without instructions for bf16 takes three times as long with it
if grep -qsw -e avx512_bf16 -e amx_bf16 -e bf16 /proc/cpuinfo ||
    nvidia-smi >/dev/null 2>&1 || [ -e /dev/kfd ]; then best=bf16; fi
PRECISION=${PRECISION:-$best}
case $PRECISION in bf16) dtype=bfloat16 ;; fp32) dtype=float32 ;; *) fail "PRECISION=$PRECISION: bf16 or fp32" ;; esac
en=$DATA_DIR/en target=$DATA_DIR/$lang run=$RUNS/$lang
echo "$PROFILE profile ($why): $what; $PRECISION ($best is the faster one on this machine)"

. ./setup.sh requirements.txt data/requirements.txt
if [ $PROFILE = paper ]; then  # does it fit, can it be had? If not, it ends here
    python data/prepare_paper.py "$lang" --plan --model "$MODEL" --out "$DATA_DIR" --flores "$FLORES" --runs "$RUNS" \
        --calibration "$CALIBRATION" --seed "$SEED" --methods $METHODS --models $(($(wc -w <<< "$METHODS") * $(wc -w <<< "$RATIOS"))) \
        --steps "$STEPS" --ratio "$(tr ' ' '\n' <<< "$RATIOS" | grep . | sort -g | head -1)" \
        --tasks "$TASKS" --language-id "$LANGUAGE_ID" $COMPACT
elif [ -n "$dry_run" ]; then
    echo "train and evaluate $METHODS ($TASKS). The default model takes 5.6 GB of memory, of $(awk '/MemAvail/ {
        printf "%.1f", $2 / 1e6}' /proc/meminfo) GB free here; disk: 0.6 GB a method and 2 GB for a checkpoint, of $(
        df -Pk . | awk 'END {printf "%.0f", $4 / 1e6}') GB free; no download but packages"
fi
if [ -n "$dry_run" ]; then exit; fi
optional() {  # PACKAGE CHECK: what only some methods and tasks need, if the check says that it is not there
    python -c "$2" 2>/dev/null || { echo "setup: installing $1"
        python -m pip install --quiet --disable-pip-version-check "$1"; }
}
if [[ " $METHODS " = *" adalora "* ]]; then optional peft==0.21.2 "import peft; assert peft.__version__ == '0.21.2'"; fi
if [[ $TASKS =~ codemix && $LANGUAGE_ID = glotlid ]]; then optional fasttext-numpy2==0.10.4 "import fasttext"; fi
if [[ $TASKS =~ ifeval|gsm8k ]]; then
    optional "lm-eval[hf,ifeval]==0.4.13" "import lm_eval.models.huggingface, nltk, langdetect, immutabledict"
    if [[ $TASKS =~ ifeval ]] && ! python -c "import nltk; nltk.data.find('tokenizers/punkt_tab')" 2>/dev/null; then
        python -m nltk.downloader punkt_tab
    fi
fi

# stage OUTPUT "INPUTS" COMMAND...: makes OUTPUT by COMMAND, unless this very command, script, model and inputs made it
# before. OUTPUT appears only when it is complete; interrupted, the same command goes on.
stage() {
    local output=$1 inputs=$2 stamp=$1.made-by key; shift 2
    key=$({ echo "$* ${model_sha256:-}"; cat "$2" requirements.txt $inputs; } | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        if [ $PROFILE = paper ] && [ -e "$output" -o -e "${output%/model}/checkpoint" ]; then  # it may have taken days
            fail "$output was made with other settings or another version: set RUNS, or delete it to make it anew"
        fi
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
if [ $PROFILE = paper ]; then
    texts="$en/xlsum.jsonl $target/xlsum.jsonl"
    train="python train.py --model $MODEL --data madlad:$lang --gradient-checkpointing auto --precision $PRECISION \
--seed $SEED --source-eval $en/xlsum.jsonl --target-eval $target/xlsum.jsonl --eval-every $save_every"
    evaluate="python evaluate.py --lang $lang --data-dir $DATA_DIR --dtype $dtype --tasks $TASKS --batch-tokens 32768"
else
    texts="$target/train.jsonl $en/heldout.jsonl $target/heldout.jsonl"
    train="python train.py --model $MODEL --data $target/train.jsonl --batch-size $batch_size --micro-batch-size 8 \
--seq-len 128 --lr 5e-4 --precision $PRECISION --seed $SEED --eval-every 16 --eval-tokens 4096 \
--source-eval $en/heldout.jsonl --target-eval $target/heldout.jsonl"
    evaluate="python evaluate.py --lang $lang --data-dir $DATA_DIR --num-samples 100 --greedy --max-new-tokens 32 \
--batch-tokens 16384 --dtype $dtype --tasks $TASKS"
fi
case $CALIBRATION in tulu|alpaca) needed=$texts ;; *) needed="$CALIBRATION $texts" ;; esac
for task in ${TASKS//,/ }; do case $task in
    mcq) needed+=" $en/mmlu.test.jsonl $target/mmlu.test.jsonl" ;;
    mt) needed+=" $target/flores.dev.jsonl $target/flores.devtest.jsonl" ;;
    sum) needed+=" $en/xlsum.jsonl $target/xlsum.jsonl" ;;
    mrc) needed+=" $en/belebele.jsonl $target/belebele.jsonl" ;;
    mmlu) needed+=" $en/mmlu.dev.jsonl $en/mmlu.test.jsonl $target/mmlu.dev.jsonl $target/mmlu.test.jsonl" ;;
    ae2|codemix) needed+=" $en/ae2.jsonl" ;;
esac; done
case $TASKS in *codemix*) evaluate+=" --language-id $LANGUAGE_ID" ;; esac
for file in $needed; do
    if [ $PROFILE = paper ] && [ "$file" != "$CALIBRATION" ] && [ ! -s "$file" ]; then
        python data/prepare_paper.py "$lang" --out "$DATA_DIR" --flores "$FLORES" --model "$MODEL"
    fi
    [ -s "$file" ] || fail "$file is missing or empty: data/README.md says what belongs there"
done
if [ $PROFILE = paper ] && [[ $TASKS =~ mt ]]; then
    case $FLORES in gated) origin=flores_plus ;; *) origin=FloresBitextMining ;; esac
    [ ! -e "$target/provenance.json" ] || grep -q $origin "$target/provenance.json" ||
        fail "$target holds the other FLORES+: set FLORES, or delete it to fetch the $FLORES one"
fi
if [ -d "$MODEL" ]; then model_sha256=$(cat "$MODEL"/*.{safetensors,json,jinja} 2>/dev/null | sha256sum); fi

stage "$run/source/eval.json" "$en/*.jsonl $target/*.jsonl" $evaluate --model "$MODEL" --out "$run/source/eval.json"

# score METHOD AXIS: makes $scores
score() {
    local text="--data $CALIBRATION --num-samples $NUM_SAMPLES --seq-len $calibration_len" inputs=
    case $1 in random|magnitude) text= ;; *) [ ! -f "$CALIBRATION" ] || inputs=$CALIBRATION ;; esac
    scores=$run/scores-$1.safetensors
    [ "$2" = column ] || scores=$run/scores-$1-$2.safetensors
    stage "$scores" "$inputs" python score.py --model "$MODEL" --out "$scores" \
        --method "$1" --axis "$2" --seed "$SEED" $text
}

# adapt METHOD RATIO: makes $run/METHOD, or $run/METHOD@RATIO for another ratio than 0.5. A static method is a mask file.
adapt() {
    local method=$1 ratio=$2 name=$1 scores= freeze=highest mask= more="--save-every $save_every"
    [ "$ratio" = 0.5 ] || name=$method@$ratio
    local out=$run/$name
    case $method in
        fft) ;;
        gmt) more+=" --gmt-ratio $ratio --micro-batch-size $((batch_size / 4))" ;;  # Table 8: 4 of them
        adalora) more=--adalora ;;
        hft) mask="--method hft --model $MODEL --ratio $ratio --seed $SEED" ;;
        s2ft-*) mask="--method $method --model $MODEL --seed $SEED" ;;
        ssu-rand) score random column ;;
        ssu-mag) score magnitude column ;;
        ssu-wanda-row) score wanda row ;;
        ssu-wanda-element) score wanda element ;;
        ssu-*) score "${method#ssu-}" column ;;
        lota*) local calibrated=$run/lota-calibration/model  # 100 steps of full fine-tuning (Table 8) choose the weights
            stage "$calibrated" "$texts" $train --out "$run/lota-calibration" --steps 100 --save-every $save_every
            scores=$run/scores-delta-element.safetensors freeze=lowest
            case $method in lota-*) ratio=0.${method#lota-} ;; esac
            stage "$scores" "$calibrated.made-by" python score.py --model "$MODEL" --out "$scores" \
                --method delta --axis element --adapted "$calibrated" ;;
    esac
    if [ -n "$scores" ]; then mask="--scores $scores --ratio $ratio --freeze $freeze"; fi
    if [ -n "$mask" ]; then
        stage "$out/mask.safetensors" "${scores:+$scores.made-by}" python make_mask.py $mask --out "$out/mask.safetensors"
        mask=$out/mask.safetensors
    fi
    case $method in *-row|*-element|lota*) ;; *) if [ -n "$mask" ]; then more+=$COMPACT; fi ;; esac
    stage "$out/model" "$texts ${mask:+$mask.made-by}" $train ${mask:+--mask $mask} --out "$out" --steps "$STEPS" $more
    stage "$out/eval.json" "$out/model.made-by $en/*.jsonl $target/*.jsonl" \
        $evaluate --model "$out/model" --out "$out/eval.json"
    names+=" $name"
}

names=
for method in $METHODS; do
    case $method in fft|adalora|s2ft-*|lota-*) adapt "$method" 0.5 ;; *)
        for ratio in $RATIOS; do adapt "$method" "$ratio"; done ;;
    esac
done
python evaluate.py --report "$run" --methods $names
