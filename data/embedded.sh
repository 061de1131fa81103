# The embedded profile of run_all.sh: a small model out of a wheel, and text from data/. It needs no
# GPU, hub or account. Every value here can be set from the environment instead.
: "${DATA_DIR:=data/embedded}" "${MODEL:=data/embedded/model}" "${RUNS:=runs}"
: "${CALIBRATION:=$DATA_DIR/en/calibration.jsonl}" "${NUM_SAMPLES:=32}" "${STEPS:=32}"
: "${TASKS:=bpb,mcq,mt,chat}" "${PRECISION:=$fastest}"
about="$STEPS steps, 5 to 8 minutes a method with the default model on two cores"
known_tasks="bpb mcq mt sum mrc mmlu chat ifeval gsm8k ae2 codemix"
en=$DATA_DIR/en target=$DATA_DIR/$lang
calibration_length=512
accumulated_micro_batch=2  # gmt accumulates four micro-batches (Table 8)
save_every=(--save-every 16)
texts=("$target/train.jsonl" "$en/heldout.jsonl" "$target/heldout.jsonl")
train_options=(--data "$target/train.jsonl" --source-eval "$en/heldout.jsonl"
    --target-eval "$target/heldout.jsonl" --eval-every 16 --eval-tokens 4096 --batch-size 8
    --micro-batch-size 8 --seq-len 128 --lr 5e-4)
evaluate_options=(--num-samples 100 --greedy --max-new-tokens 32 --batch-tokens 16384)
