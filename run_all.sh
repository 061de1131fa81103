#!/usr/bin/env bash
# Run Source-Shielded Updates end to end: masks, training, evaluation, report.
#
#   bash run_all.sh ne [--dry-run]            ne is Nepali: any code of data/languages.json
#   METHODS="ssu-wanda hft" RATIOS="0.25 0.5" bash run_all.sh ne
#
# Finished stages are skipped, interrupted ones resume, those with other inputs are run again, or
# refused (paper, your text or model). --dry-run installs packages and says what a run needs. With
# two machines, call on each: torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d
# --rdzv-endpoint=HOST train.py ... with the options of a "+" line. Variables, and their defaults:
#   METHODS    "fft ssu-wanda": some of fft adalora hft gmt lota lota-90 lota-50 s2ft-down ssu-rand
#              s2ft-down-{output,embeddings} ssu-{mag,wanda,sparsegpt,fim} ssu-wanda-{row,element}
#   RATIOS     0.5: fractions of the columns to freeze, each giving a model
#   PROFILE    paper on 100 GB of GPUs with a hub if MODEL and DATA_DIR are unset, else embedded.
#              Sets MODEL DATA_DIR RUNS STEPS LR TASKS PRECISION CALIBRATION NUM_SAMPLES if unset
#   COMPACT    0: 1 trains with --compact, where columns are frozen     OPTIMIZER   adamw
#   NPROC      GPUs to use, by default as many as divide 8 (embedded: 2)
#   SEED       42    FLORES  ungated, gated    LANGUAGE_ID  glotlid, script    FLASH_ATTN  0, 1
set -eEuo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = --help ]; then sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit; fi
. tools/driver.sh  # choose_profile, read_lists, prepare_embedded, require, run, stage
[[ $# = 1 || "$# ${2:-}" = "2 --dry-run" ]] || fail "usage: bash run_all.sh LANG [--dry-run]"

# The profile, its values, yours. Bad ones are refused before anything is installed or written.
lang=$1; : "${OPTIMIZER:=adamw}"; choose_profile
. "data/$PROFILE.sh"
: "${SEED:=42}" "${COMPACT:=0}" "${FLASH_ATTN:=0}" "${FLORES:=ungated}" "${LANGUAGE_ID:=glotlid}"
read_lists  # methods, ratios and tasks are arrays from here on
plan=(tools/plan.py --model "$MODEL" --lang "$lang" --profile "$PROFILE" --data-dir "$DATA_DIR"
    --runs "$RUNS" --methods "${methods[@]}" --ratios "${ratios[@]}" --tasks "${tasks[@]}"
    --steps "$STEPS" --precision "$PRECISION" --compact "$COMPACT" --calibration "$CALIBRATION"
    --num-samples "$NUM_SAMPLES" --seed "$SEED" --flores "$FLORES" --language-id "$LANGUAGE_ID"
    --gpus "$NPROC" --optimizer "$OPTIMIZER" --lr "$LR" "${batch[@]}")
"${PYTHON:-python3}" "${plan[@]}" --check || exit
echo "$PROFILE profile ($why): $MODEL, $about; $PRECISION, processes: $NPROC"

# Packages. Then what the run needs, and whether it fits here.
. ./setup.sh requirements.txt data/requirements.txt
run python "${plan[@]}"
if [ "${2:-}" = --dry-run ]; then exit; else check_gpus; fi
install_for "${methods[@]}" "${tasks[@]}" "$OPTIMIZER"

# One run at a time in a folder. Its stages hold the lock too.
dir=$RUNS/$lang; mkdir -p "$dir"; exec 9> "$dir/.lock"
flock -n 9 || fail "another run works in $dir. Wait for it, or set RUNS"

# Data and the source model.
if [ "$DATA_DIR" = data/embedded ] || [ "$MODEL" = data/embedded/model ]; then prepare_embedded; fi
[ "$PROFILE" = embedded ] ||
    run python data/prepare_paper.py "$lang" --out "$DATA_DIR" --flores "$FLORES" --model "$MODEL"
require "${texts[@]}" "${score_inputs[@]}" "${chat_inputs[@]}"; save_prompts
[ ! -d "$MODEL" ] || model_sha256=$(sha256_of "$MODEL")

train=(python train.py --model "$MODEL" --seed "$SEED" --steps "$STEPS" --precision "$PRECISION"
    --optimizer "$OPTIMIZER" "${train_options[@]}")
score() {  # METHOD AXIS [OPTION...]: set $scores, how much each weight matters for the source
    scores=$dir/scores-$1.safetensors; [ "$2" = column ] || scores=$dir/scores-$1-$2.safetensors
    stage "$scores" ${3:+"${score_inputs[@]}"} -- python score.py --model "$MODEL" \
        --out "$scores" --method "$1" --axis "$2" --seed "$SEED" "${@:3}"
}
evaluate() {  # MODEL FOLDER [INPUT...]: what is gained in the target language and lost in English
    local shared=(--model "$1" --lang "$lang" --data-dir "$DATA_DIR" --dtype "$dtype")
    local inputs=("${@:3}" "${prompt_files[@]}" "$en"/[!t]*.jsonl "$target"/*.jsonl)  # no t3.jsonl
    [ -z "$evaluate_tasks" ] || stage "$2/eval.json" "${inputs[@]}" -- python evaluate.py \
        "${shared[@]}" --tasks "${evaluate_tasks#,}" "${evaluate_options[@]}" --out "$2/eval.json"
    [ -z "$chat_tasks" ] || stage "$2/chat.json" "${inputs[@]}" "${chat_inputs[@]}" -- python \
        tools/chat_eval.py "${shared[@]}" --tasks "${chat_tasks#,}" --out "$2/chat.json" \
        --language-id "$LANGUAGE_ID" "${chat_options[@]}"
    evaluated+=("${2##*/}")
}
adapt() {  # METHOD RATIO: a static method is a mask file, the others are options of train.py
    local out=$dir/$1 ratio=$2 scores= mask=() inputs=() options=()
    [ "$2" = 0.5 ] || out=$dir/$1@$2
    case $1 in
        fft) ;;
        adalora) options=(--adalora --precision "${PRECISION%-true}" --save-every 0) ;;
        gmt) options=(--gmt-ratio "$2") ;;
        s2ft-*) mask=(--method "$1" --model "$MODEL" --seed "$SEED") ;;
        ssu-rand) score random column ;;
        ssu-mag) score magnitude column ;;
        ssu-wanda-*) score wanda "${1#ssu-wanda-}" "${calibration[@]}" ;;
        ssu-*) score "${1#ssu-}" column "${calibration[@]}" ;;
        lota*)  # 100 steps of full fine-tuning choose the weights, those that move most
            local tuned=$dir/lota-calibration score_inputs=("$dir/lota-calibration/model.made-by")
            stage "$tuned/model" "${texts[@]}" -- "${train[@]}" --out "$tuned" --steps 100
            score delta element --adapted "$tuned/model"
            [ "$1" = lota ] || ratio=0.${1#lota-} ;;
        *) mask=(--method "$1" --model "$MODEL" --ratio "$2" --seed "$SEED") ;;  # hft
    esac
    [ -z "$scores" ] || mask=(--scores "$scores" --ratio "$ratio")
    if [ ${#mask[@]} -gt 0 ]; then
        stage "$out/mask.safetensors" ${scores:+"$scores.made-by"} -- \
            python make_mask.py "${mask[@]}" --out "$out/mask.safetensors"
        inputs=("$out/mask.safetensors.made-by"); options+=(--mask "$out/mask.safetensors")
        [ "$COMPACT" = 0 ] || case $1 in *-row|*-element|lota*) ;; *) options+=(--compact) ;; esac
    fi
    stage "$out/model" "${texts[@]}" "${inputs[@]}" -- "${train[@]}" --out "$out" "${options[@]}"
    evaluate "$out/model" "$out" "$out/model.made-by"
}

# The recipe: evaluate the source model, adapt it by each method and ratio, and report.
evaluate "$MODEL" "$dir/source"
for method in "${methods[@]}"; do
    case $method in
        fft|adalora|s2ft-*|lota-*) adapt "$method" 0.5 ;;  # these have no ratio to choose
        *) for ratio in "${ratios[@]}"; do adapt "$method" "$ratio"; done ;;
    esac
done
run python tools/report.py "$dir" --methods "${evaluated[@]}"
