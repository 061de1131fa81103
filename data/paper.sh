# The paper profile of run_all.sh: OLMo-2 7B Instruct and 200M tokens of MADLAD-400 in the paper's
# numerics (bf16 weights), and its evaluation sets. It needs one large GPU and the hub. Values in
# capitals can be set from the environment instead.
: "${DATA_DIR:=data/paper}" "${MODEL:=allenai/OLMo-2-1124-7B-Instruct}" "${RUNS:=runs/${MODEL##*/}}"
: "${CALIBRATION:=tulu}" "${NUM_SAMPLES:=500}" "${STEPS:=12208}" "${PRECISION:=bf16-true}"
: "${TASKS:=mt,sum,mrc,mmlu,ifeval,gsm8k,ae2,codemix}"
about="$STEPS steps on MADLAD-400, hours a method (docs/PERFORMANCE.md)"
en=$DATA_DIR/en target=$DATA_DIR/$lang
batch=(--gradient-checkpointing)
accumulated=8  # sequences of each of the four micro-batches of gmt (Table 8)
calibration=(--data "$CALIBRATION" --num-samples "$NUM_SAMPLES" --seq-len 2048)
texts=("$en/xlsum.jsonl" "$target/xlsum.jsonl")
train_options=(--data "madlad:$lang" --source-eval "$en/xlsum.jsonl"
    --target-eval "$target/xlsum.jsonl" --eval-every 500 "${batch[@]}" --save-every 500)
evaluate_options=(--batch-tokens 32768)
