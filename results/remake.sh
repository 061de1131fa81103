#!/usr/bin/env bash
# Make the runs behind docs/RESULTS.md: figures and tables of the paper, in miniature.
#
#   bash results/remake.sh --list                 the targets, with their runs and hours
#   bash results/remake.sh figure2 table5         some of them, or: all
#
# A run is a call of run_all.sh for one model, which resumes. Its evaluation and its log of training,
# which are small, are copied to OUT. A run whose evaluation is there is skipped, so the targets can
# be made bit by bit, on several machines: delete an evaluation to have it made again. The models are
# deleted. JOBS of them, 2 or 1, are made at a time. What they print is in WORK/*.log. NTREX-128 must
# lie in NTREX (data/README.md). The other variables of run_all.sh are as usual. Delete WORK after a
# change of code. For a trial:
#   STEPS=1 MODEL=DIR DATA_DIR=DIR WORK=DIR OUT=DIR bash results/remake.sh table5
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
eighths="0.125 0.25 0.375 0.625 0.75 0.875"

target() {  # NAME: name the runs of a target by `call RUN RESULTS SEED LANG VARIABLE=VALUE...`
    local text seed lang size lr precision optimizer
    case $1 in
        figure2)  # the freezing ratio: all eighths for one seed, quarters for three. 0.5: tables346
            local curves=("METHODS=ssu-wanda hft gmt" PRECISION=fp32 COMPACT=1)
            call embedded ratio 42 ne "${curves[@]}" "RATIOS=$eighths"
            call ntrex ratio-ntrex 42 ne "${curves[@]}" "RATIOS=$eighths" DATA_DIR="$NTREX"
            for seed in 43 44; do
                call embedded ratio "$seed" ne "${curves[@]}" "RATIOS=0.25 0.75"
                call ntrex ratio-ntrex "$seed" ne "${curves[@]}" "RATIOS=0.25 0.75" \
                    DATA_DIR="$NTREX"
            done ;;
        table5)  # calibration text: three other sources, then two other sizes than 32 sequences
            for seed in 42 43 44; do
                local one=("$seed" ne METHODS=ssu-wanda PRECISION=fp32 COMPACT=1)
                for text in short long prose; do
                    call "embedded-$text" "calibration-$text" "${one[@]}" \
                        "CALIBRATION=$WORK/$text.jsonl"
                done
                for size in 8 128; do
                    call "embedded-$size" "calibration-$size" "${one[@]}" NUM_SAMPLES="$size"
                done
            done ;;
        tables346)  # every method, on two texts
            for seed in 42 43 44; do
                local every=("METHODS=$single $columns ssu-wanda-row ssu-wanda-element")
                call embedded embedded-bpb "$seed" ne "${every[@]}" PRECISION=fp32
                call ntrex ntrex-bpb "$seed" ne "${every[@]}" PRECISION=fp32 DATA_DIR="$NTREX"
            done ;;
        languages)
            for lang in ne ky am ha ig; do
                for seed in 42 43 44; do
                    call embedded embedded-bpb "$seed" "$lang" PRECISION=fp32 \
                        "METHODS=fft hft ssu-wanda ssu-rand"
                done
            done ;;
        precision)  # the authors' numerics beside fp32 weights (tables346), by learning rate; 8 bits
            local some=("METHODS=fft ssu-wanda hft" COMPACT=1)
            for seed in 42 43 44; do
                call embedded-bf16-true precision-bf16-true "$seed" ne "${some[@]}" \
                    PRECISION=bf16-true
                for optimizer in adamw8bit adamw8bit-nearest; do
                    call "embedded-$optimizer" "precision-$optimizer" "$seed" ne COMPACT=1 \
                        METHODS=ssu-wanda PRECISION=bf16-true OPTIMIZER="$optimizer"
                done
            done
            for lr in 1e-4 2e-3; do
                for precision in fp32 bf16-true; do
                    call "embedded-$precision-$lr" "precision-$precision-$lr" 42 ne "${some[@]}" \
                        PRECISION="$precision" LR="$lr"
                done
            done ;;
        eight-bit)  # bf16 weights, with moments in fp32 and in 8 bits. fp32 weights: tables346
            for seed in 42 43 44; do
                for optimizer in adamw adamw8bit adamw8bit-nearest; do
                    call "ntrex-$optimizer" "eight-bit-$optimizer" "$seed" ne COMPACT=1 \
                        METHODS=ssu-wanda PRECISION=bf16-true OPTIMIZER="$optimizer" \
                        DATA_DIR="$NTREX"
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

make_all() {  # RUN RESULTS SEED LANG VARIABLE=VALUE...: make the models that OUT does not have
    local runs=$WORK/$1/$3 to=$OUT/$2-$4/$3 log=$WORK/$1-$4-$3.log model ratio code items
    trap 'kill "$child"; wait "$child"; exit 143' TERM
    for model in $(models_of "${@:5}"); do
        [ ! -e "$to/$model/eval.json" ] || continue
        # Training has a seed, the source model has none: take its answers from another run.
        for items in "$WORK/${1%%-*}"*/*/"$4"/source/eval.items.jsonl; do
            [ -e "$items" ] && [ ! -e "$runs/$4/source" ] || continue
            mkdir -p "$runs/$4/source"
            cp "$items" "$runs/$4/source/"
        done
        code=0 ratio=0.5
        [[ $model != *@* ]] || ratio=${model#*@}
        env SEED="$3" RUNS="$runs" "${@:5}" METHODS="${model%@*}" RATIOS="$ratio" \
            bash run_all.sh "$4" >> "$log" 2>&1 &
        child=$!
        wait "$child" || code=$?
        if [ "$code" != 0 ]; then
            echo "failed with $code: $to/$model, see $log" >&2
            return "$code"
        fi
        mkdir -p "$to/source" "$to/$model"
        [ -e "$to/source/eval.json" ] || cp "$runs/$4/source/eval.json" "$to/source/"
        cp "$runs/$4/$model"/{eval.json,train.jsonl} "$to/$model/"
        rm -r "$runs/$4/$model"/{model,eval.json}  # both are made again if the copy is deleted
        echo "done: $to/$model"
    done
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
[ "$DATA_DIR" != data/embedded ] || (. tools/driver.sh && prepare_embedded)
# Two sets of chats without a chat in common, and help texts of Python's library.
awk 'length <= 400' "$DATA_DIR"/en/calibration.jsonl > "$WORK/short.jsonl"
awk 'length > 400' "$DATA_DIR"/en/calibration.jsonl > "$WORK/long.jsonl"
cp "$DATA_DIR"/en/prose.jsonl "$WORK/prose.jsonl"

pids=()
call() {  # the arguments of make_all: start it when fewer than JOBS are at work
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || :; done
    echo "start: $1 $3 $4 ${*:5}"
    make_all "$@" &
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
