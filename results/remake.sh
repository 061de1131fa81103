#!/usr/bin/env bash
# Make the runs behind docs/RESULTS.md: figures and tables of the paper, in miniature.
#
#   bash results/remake.sh --list                 the targets, with their runs and hours
#   bash results/remake.sh figure2 table5         some of them, or: all
#
# A target is some calls of run_all.sh, which skips what is done and resumes. JOBS of them, 2 or 1,
# are made at a time. What a call prints is in WORK/*.log. Evaluations and logs of training, which
# are small, are copied to OUT. NTREX-128 must lie in NTREX (data/README.md). The other variables of
# run_all.sh are as usual. For a trial: STEPS=1 MODEL=DIR DATA_DIR=DIR WORK=DIR OUT=DIR
set -euo pipefail
cd "$(dirname "$0")/.."
: "${JOBS:=2}" "${OUT:=results}" "${WORK:=runs/remake}" "${TASKS:=bpb}"
: "${DATA_DIR:=data/embedded}" "${NTREX:=data/ntrex}"
case $JOBS in 1|2) ;; *) echo "remake.sh: error: JOBS is $JOBS. Choose 1 or 2" >&2; exit 2 ;; esac
cores=$(nproc)
export TASKS DATA_DIR PROFILE=embedded OMP_NUM_THREADS=$((cores < JOBS ? 1 : cores / JOBS))
minutes=4  # of a run with the default model on two cores

targets=(figure2 table5 tables346 languages precision eight-bit)
single="fft adalora lota-90 lota-50 s2ft-down s2ft-down-output s2ft-down-embeddings"
columns="hft gmt ssu-rand ssu-mag ssu-wanda ssu-sparsegpt ssu-fim"
eighths="0.125 0.25 0.375 0.5 0.625 0.75 0.875"

target() {  # NAME: name the calls of a target by `call RUN RESULTS SEED LANG VARIABLE=VALUE...`
    local text seed lang
    case $1 in
        figure2)  # the freezing ratio: all eighths for one seed, quarters for three
            for text in embedded ntrex; do
                local curves=("METHODS=ssu-wanda hft gmt" PRECISION=fp32) ratio=ratio
                [ "$text" = embedded ] || curves+=("DATA_DIR=$NTREX") ratio=ratio-ntrex
                call "$text" "$ratio" 42 ne "${curves[@]}" "RATIOS=$eighths"
                for seed in 43 44; do
                    call "$text" "$ratio" "$seed" ne "${curves[@]}" "RATIOS=0.25 0.5 0.75"
                done
            done ;;
        table5)  # calibration text: three other sources, then two other sizes than 32 sequences
            for seed in 42 43 44; do
                local one=("$seed" ne METHODS=ssu-wanda PRECISION=fp32)
                for text in short long prose; do
                    call "embedded-$text" "calibration-$text" "${one[@]}" \
                        "CALIBRATION=$WORK/$text.jsonl"
                done
                for text in 8 128; do
                    call "embedded-$text" "calibration-$text" "${one[@]}" NUM_SAMPLES="$text"
                done
            done ;;
        tables346)  # every method, on two texts
            for seed in 42 43 44; do
                local every=("METHODS=$single $columns ssu-wanda-row ssu-wanda-element")
                call embedded embedded "$seed" ne "${every[@]}" PRECISION=fp32
                call ntrex ntrex "$seed" ne "${every[@]}" PRECISION=fp32 DATA_DIR="$NTREX"
            done ;;
        languages)
            for lang in ne ky am ha ig; do
                for seed in 42 43 44; do
                    call embedded embedded "$seed" "$lang" PRECISION=fp32 \
                        "METHODS=fft hft ssu-wanda ssu-rand"
                done
            done ;;
        precision)  # the authors' numerics beside fp32 weights, by learning rate
            for text in fp32 bf16-true; do
                local some=("METHODS=fft ssu-wanda hft" PRECISION="$text")
                local run=embedded-$text; [ "$text" != fp32 ] || run=embedded
                for seed in 42 43 44; do
                    call "$run" "precision-$text" "$seed" ne "${some[@]}"
                done
                for lr in 1e-4 2e-3; do
                    call "$run-$lr" "precision-$text-$lr" 42 ne "${some[@]}" LR="$lr"
                done
            done ;;
        eight-bit)  # fp32 weights, bf16 weights, and bf16 weights with 8-bit moments
            for seed in 42 43 44; do
                local news=("$seed" ne DATA_DIR="$NTREX" COMPACT=1 METHODS=ssu-wanda)
                call ntrex-compact eight-bit-fp32 "${news[@]}" PRECISION=fp32
                for text in adamw adamw8bit adamw8bit-nearest; do
                    call "ntrex-$text" "eight-bit-$text" "${news[@]}" PRECISION=bf16-true \
                        OPTIMIZER="$text"
                done
            done ;;
        *) echo "remake.sh: error: no target $1. Choose: ${targets[*]} all" >&2; exit 2 ;;
    esac
}

models_of() {  # VARIABLE=VALUE...: the folders that run_all.sh makes
    local METHODS RATIOS=0.5 assignment method ratio
    for assignment in "$@"; do
        case $assignment in METHODS=*|RATIOS=*) local "$assignment" ;; esac
    done
    for method in $METHODS; do
        case " $single " in *" $method "*) echo "$method"; continue ;; esac
        for ratio in $RATIOS; do
            if [ "$ratio" = 0.5 ]; then echo "$method"; else echo "$method@$ratio"; fi
        done
    done
}

make_one() {  # RUN RESULTS SEED LANG VARIABLE=VALUE...: call run_all.sh, and copy what is small
    local base=$WORK/$1/$3 to=$OUT/$2-$4/$3 log=$WORK/$1-$4-$3.log model file code=0
    trap 'kill "$child"; wait "$child"; exit 143' TERM
    env SEED="$3" RUNS="$base" "${@:5}" bash run_all.sh "$4" >> "$log" 2>&1 &
    child=$!
    wait "$child" || code=$?
    [ "$code" = 0 ] || echo "failed with $code: $1 $3 $4, see $log" >&2
    for model in source $(models_of "${@:5}"); do
        for file in eval.json train.jsonl; do
            [ -e "$base/$4/$model/$file" ] || continue
            mkdir -p "$to/$model"
            cp "$base/$4/$model/$file" "$to/$model/$file"
        done
    done
    [ "$code" != 0 ] || echo "done: $to"
    return "$code"
}

case ${1:---help} in
    --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"; exit ;;
    --list)
        call() { models_of "${@:5}"; }
        for name in "${targets[@]}"; do
            target "$name" | awk -v name="$name" -v minutes="$minutes" \
                'END { printf "%-10s %3d runs, %4.1f hours\n", name, NR, NR * minutes / 60 }'
        done
        exit ;;
    all) set -- "${targets[@]}" ;;
esac
call() { :; }
for name in "$@"; do target "$name"; done  # a wrong name ends here

# The packages, the data and the model are made by one run alone.
. ./setup.sh requirements.txt data/requirements.txt
install_for adalora adamw8bit
mkdir -p "$WORK"
[ -e "$DATA_DIR/en/calibration.jsonl" ] ||
    SEED=42 RUNS=$WORK/embedded/42 METHODS=fft PRECISION=fp32 bash run_all.sh ne
# Two sets of chats without a chat in common, and help texts of Python's library.
awk 'length <= 400' "$DATA_DIR"/en/calibration.jsonl > "$WORK/short.jsonl"
awk 'length > 400' "$DATA_DIR"/en/calibration.jsonl > "$WORK/long.jsonl"
cp "$DATA_DIR"/en/prose.jsonl "$WORK/prose.jsonl"

pids=()
call() {  # the arguments of make_one: start it when fewer than JOBS are at work
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || :; done
    echo "start: $1 $3 $4 ${*:5}"
    make_one "$@" &
    pids+=($!)
}
finish() {  # wait for all. A signal ends the calls, and the same command resumes
    local pid failed=0
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    pids=()
    [ "$failed" = 0 ] || { echo "remake.sh: error: some runs failed, see above" >&2; exit 1; }
}
trap 'kill "${pids[@]}" 2>/dev/null || :; wait; exit 130' INT TERM
for name in "$@"; do
    target "$name"
    finish  # two calls never work in one folder
done
echo "next: python tools/report.py --page docs/RESULTS.md"
