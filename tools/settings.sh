# Sourced by run_all.sh: choose the profile, take its defaults, and refuse bad values before
# anything is installed, written or deleted.
set -f  # values are words, never patterns
set_list() { read -d '' -ra "$1" <<< "$2" || :; }  # ARRAY "WORDS": split at white space
is_one_of() { [[ " $2 " = *" $1 "* ]]; }           # WORD "WORDS"

lang=${1:-} dry_run=${2:-}
codes=$("${PYTHON:-python3}" -c 'import json
print(*sorted(json.load(open("data/languages.json", encoding="utf-8")).keys() - {"en"}))')
if [ -z "$lang" ] || ! is_one_of "$lang" "$codes"; then
    echo "usage: bash run_all.sh LANG [--dry-run], LANG being one of: $codes" >&2
    exit 2
fi
[ $# -le 2 ] && [ "${dry_run:---dry-run}" = --dry-run ] || fail "the only option is --dry-run"

# The profile. A 7B model trains with bf16 weights in 88 GB and activations.
gpu=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1) || :
[[ $gpu =~ ^[0-9]+$ ]] || gpu=0  # MiB
hub=${HF_ENDPOINT:-https://huggingface.co}
if [ -n "${PROFILE:-}" ]; then
    why="as asked"
elif [ -n "${MODEL:-}${DATA_DIR:-}" ]; then
    PROFILE=embedded why="MODEL or DATA_DIR is given"
elif [ "$gpu" -lt 130000 ]; then
    PROFILE=embedded why="no GPU has the 130 GB that a 7B model takes"
elif ! "${PYTHON:-python3}" -c "import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=9)" "$hub" 2>/dev/null; then
    PROFILE=embedded why="the hub does not answer"
else
    PROFILE=paper why="the GPU has $gpu MiB, and the hub answers"
fi
is_one_of "$PROFILE" "embedded paper" || fail "PROFILE=$PROFILE: choose embedded or paper"

# A processor without instructions for bf16 takes three times as long with it.
fastest=fp32
if [ "$gpu" -gt 0 ] || [ -e /dev/kfd ] ||
    grep -qsw -e avx512_bf16 -e amx_bf16 -e bf16 /proc/cpuinfo; then fastest=bf16; fi
. "data/$PROFILE.sh"
: "${SEED:=42}" "${COMPACT:=0}" "${FLASH_ATTN:=0}" "${FLORES:=ungated}" "${LANGUAGE_ID:=glotlid}"

# Lists of words.
set_list methods "${METHODS:-fft ssu-wanda}"
set_list ratios "${RATIOS:-0.5}"
set_list tasks "${TASKS//,/ }"
known_methods="fft adalora hft gmt ssu-rand ssu-mag ssu-wanda ssu-sparsegpt ssu-fim ssu-wanda-row \
ssu-wanda-element lota lota-90 lota-50 s2ft-down s2ft-down-output"
[ ${#methods[@]} -gt 0 ] && [ ${#ratios[@]} -gt 0 ] && [ ${#tasks[@]} -gt 0 ] ||
    fail "METHODS, RATIOS and TASKS must name at least one each"
for method in "${methods[@]}"; do
    is_one_of "$method" "$known_methods" || fail "METHODS has $method: choose from $known_methods"
done
for i in "${!ratios[@]}"; do
    [[ ${ratios[i]} =~ ^(0(\.[0-9]+)?|1(\.0+)?)$ ]] ||
        fail "RATIOS has ${ratios[i]}: each must lie between 0 and 1"
    ratios[i]=$(LC_ALL=C printf %g "${ratios[i]}")
    if is_one_of gmt "${methods[*]}" && [ "${ratios[i]}" = 1 ]; then
        fail "RATIOS has 1: gmt cannot drop all gradients"
    fi
done
evaluate_tasks= chat_tasks=
for task in "${tasks[@]}"; do
    is_one_of "$task" "$known_tasks" ||
        fail "TASKS has $task: the $PROFILE profile has data for $known_tasks"
    case $task in
        ifeval|gsm8k|ae2|codemix) chat_tasks+=,$task ;;
        *) evaluate_tasks+=,$task ;;
    esac
done
evaluate_tasks=${evaluate_tasks#,} chat_tasks=${chat_tasks#,}

# Single values.
[[ $STEPS =~ ^[1-9][0-9]*$ ]] || fail "STEPS=$STEPS: must be a whole number above 0"
[[ $NUM_SAMPLES =~ ^[1-9][0-9]*$ ]] || fail "NUM_SAMPLES=$NUM_SAMPLES: must be a whole number"
[[ $SEED =~ ^[0-9]{1,18}$ ]] || fail "SEED=$SEED: must be a whole number"
[[ $COMPACT =~ ^[01]$ ]] || fail "COMPACT=$COMPACT: choose 0 or 1"
[[ $FLASH_ATTN =~ ^[01]$ ]] || fail "FLASH_ATTN=$FLASH_ATTN: choose 0 or 1"
is_one_of "$FLORES" "gated ungated" || fail "FLORES=$FLORES: choose gated or ungated"
is_one_of "$LANGUAGE_ID" "glotlid script" ||
    fail "LANGUAGE_ID=$LANGUAGE_ID: choose glotlid or script"
case $PRECISION in
    bf16|bf16-true) dtype=bfloat16 ;;
    fp16) dtype=float16 ;;
    fp32) dtype=float32 ;;
    *) fail "PRECISION=$PRECISION: choose bf16, bf16-true, fp16 or fp32" ;;
esac
[[ -d $MODEL || $MODEL = data/embedded/model || $MODEL =~ ^[[:alnum:]_-]+/[[:alnum:]._-]+$ ]] ||
    fail "MODEL=$MODEL: no such folder, and not the id of a model of the hub"

# What must be there before the first stage: texts, and what each task reads.
needed=("${texts[@]}")
is_one_of "$CALIBRATION" "tulu alpaca" || needed+=("$CALIBRATION")
for task in "${tasks[@]}"; do
    case $task in
        mcq) needed+=("$en/mmlu.test.jsonl" "$target/mmlu.test.jsonl") ;;
        mt) needed+=("$target/flores.dev.jsonl" "$target/flores.devtest.jsonl") ;;
        sum) needed+=("$en/xlsum.jsonl" "$target/xlsum.jsonl") ;;
        mrc) needed+=("$en/belebele.jsonl" "$target/belebele.jsonl") ;;
        mmlu) needed+=("$en"/mmlu.{dev,test}.jsonl "$target"/mmlu.{dev,test}.jsonl) ;;
        ae2|codemix) needed+=("$en/ae2.jsonl") ;;
    esac
done
all_there() {  # FILE...: whether all are there and not empty; $missing is the first that is not
    for missing in "$@"; do [ -s "$missing" ] || return 1; done
}
case $DATA_DIR$PROFILE in
    data/embedded*|*paper) ;;  # the run makes them
    *) all_there "${needed[@]}" ||
        fail "$missing is missing or empty: see data/README.md" ;;
esac
if [ "$PROFILE" = paper ] && is_one_of mt "${tasks[*]}" && [ -e "$target/provenance.json" ]; then
    case $FLORES in gated) origin=flores_plus ;; *) origin=FloresBitextMining ;; esac
    grep -q "$origin" "$target/provenance.json" ||
        fail "$target holds the other FLORES+. Set FLORES, or delete it to fetch the $FLORES one"
fi

# Options of the stages, and the files that they read.
calibration=(--data "$CALIBRATION" --num-samples "$NUM_SAMPLES" --seq-len "$calibration_length")
score_inputs=()
[ ! -f "$CALIBRATION" ] || score_inputs=("$CALIBRATION")
evaluate_options+=(--tasks "$evaluate_tasks" --dtype "$dtype")
chat_options=(--tasks "$chat_tasks")
! is_one_of codemix "${tasks[*]}" || chat_options+=(--language-id "$LANGUAGE_ID")
model_files() {  # the files that make up a model folder, each ended by a zero byte
    find "$MODEL" -maxdepth 1 -type f -regex '.*\.\(safetensors\|json\|jinja\)' -print0 | LC_ALL=C sort -z
}
install_optional() {  # "METHODS" "TASKS": packages that only some of them need
    if is_one_of adalora "$1"; then
        optional peft==0.21.2 "import peft; assert peft.__version__ == '0.21.2'"
    fi
    if is_one_of codemix "$2" && [ "$LANGUAGE_ID" = glotlid ]; then
        optional fasttext-numpy2==0.10.4 "import fasttext"
    fi
    if is_one_of ifeval "$2" || is_one_of gsm8k "$2"; then
        optional "lm-eval[hf,ifeval]==0.4.13" \
            "import lm_eval.models.huggingface, nltk, langdetect, immutabledict"
    fi
    if is_one_of ifeval "$2" &&
        ! python -c "import nltk; nltk.data.find('tokenizers/punkt_tab')" 2>/dev/null; then
        python -m nltk.downloader punkt_tab
    fi
}
set +f
