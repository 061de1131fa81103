# The embedded profile of run_all.sh: a small model out of a wheel, and text from data/. It needs no
# GPU, hub or account. The values in capitals can be set from the environment instead.
precision=fp32  # a run in bf16 takes many times as long on a processor without its instructions
if [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] ||
    grep -qsw -e avx512_bf16 -e amx_bf16 -e bf16 /proc/cpuinfo; then precision=bf16; fi
: "${DATA_DIR:=data/embedded}" "${MODEL:=data/embedded/model}"
MODEL=${MODEL%/} DATA_DIR=${DATA_DIR%/}
[ "$MODEL" = data/embedded/model ] || : "${RUNS:=runs/embedded-${MODEL//\//-}}"  # its own results
: "${RUNS:=runs}"
: "${CALIBRATION:=$DATA_DIR/en/calibration.jsonl}" "${NUM_SAMPLES:=32}" "${STEPS:=32}"
: "${TASKS:=bpb,mcq,mt,chat}" "${PRECISION:=$precision}" "${LR:=5e-4}"
about="$STEPS steps at rate $LR, 2 to 30 minutes a method with the default model on two cores"
en=$DATA_DIR/en target=$DATA_DIR/$lang
batch=(--batch-size 8 --micro-batch-size 8 --seq-len 128)
accumulated=2  # sequences of each of the four micro-batches of gmt (Table 8)
calibration=(--data "$CALIBRATION" --num-samples "$NUM_SAMPLES" --seq-len 512)
every=16  # checkpoints of a large model take time
case ${#STEPS} in 1 | 2) ;; 3) every=100 ;; *) every=500 ;; esac
texts=("$target/train.jsonl" "$en/heldout.jsonl" "$target/heldout.jsonl")
train_options=(--data "$target/train.jsonl" --source-eval "$en/heldout.jsonl"
    --target-eval "$target/heldout.jsonl" --eval-every "$every" "${batch[@]}"
    --lr "$LR" --save-every "$every" --eval-tokens 4096)
chat_options=()
evaluate_options=(--num-samples 100 --greedy --max-new-tokens 32 --batch-tokens 16384)
