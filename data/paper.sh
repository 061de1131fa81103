# The paper profile of run_all.sh: OLMo-2 7B Instruct and 200M tokens of MADLAD-400 in the paper's
# numerics (bf16 weights), and its evaluation sets. It needs one large GPU and the hub. Values in
# capitals can be set from the environment instead. TASKS can have t3 too, the safety suite: its
# judge and a part of its prompts are gated, and the other prompts are in a clone of a repository.
: "${DATA_DIR:=data/paper}" "${MODEL:=allenai/OLMo-2-1124-7B-Instruct}"
MODEL=${MODEL%/} DATA_DIR=${DATA_DIR%/}
: "${RUNS:=runs/${MODEL##*/}}"
: "${CALIBRATION:=tulu}" "${NUM_SAMPLES:=500}" "${STEPS:=12208}" "${PRECISION:=bf16-true}"
: "${TASKS:=mt,sum,mrc,mmlu,ifeval,gsm8k,ae2,codemix,mtb}" "${LR:=5e-5}"
if [[ " ${TASKS//,/ } " = *" t3 "* && ! -s $DATA_DIR/en/t3.jsonl ]]; then
    fail "t3 needs $DATA_DIR/en/t3.jsonl: HF_TOKEN=... python data/prepare_paper.py $lang" \
        "--out $DATA_DIR --safety-eval CLONE. See data/README.md"
fi
about="$STEPS steps at rate $LR on MADLAD-400, hours a method (docs/PERFORMANCE.md)"
en=$DATA_DIR/en target=$DATA_DIR/$lang
batch=(--gradient-checkpointing)
accumulated=8  # sequences of each of the four micro-batches of gmt (Table 8)
calibration=(--data "$CALIBRATION" --num-samples "$NUM_SAMPLES" --seq-len 2048)
texts=("$en/xlsum.jsonl" "$target/xlsum.jsonl")
train_options=(--data "madlad:$lang" --source-eval "$en/xlsum.jsonl"
    --target-eval "$target/xlsum.jsonl" --eval-every 500 "${batch[@]}"
    --lr "$LR" --save-every 500)
evaluate_options=(--batch-tokens 32768) chat_options=("${evaluate_options[@]}")
