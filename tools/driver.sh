# Sourced by run_all.sh, so that the recipe there stays a straight line: how it chooses a profile,
# runs a command, makes an output only once, and ends on an error or a signal.
fail() {
    echo "run_all.sh: error: $*" >&2
    exit 2
}
trap 'code=$? line=$LINENO
    echo "run_all.sh: error: line $line of ${BASH_SOURCE[0]} ended with $code" >&2
    exit "$code"' ERR

child=
stop() {  # SIGNAL CODE: end the command that runs, then the script
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -- "-$child" 2>/dev/null || :
        wait "$child" || :
    fi
    echo >&2  # below a progress bar
    echo "run_all.sh: stopped by $1. The same command resumes" >&2
    exit "$2"
}
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM
trap 'stop SIGHUP 129' HUP

choose_profile() {  # set PROFILE, if it is not, and $why and $gpus
    local memory hub=${HF_ENDPOINT:-https://huggingface.co}
    local ask=(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits)
    ask+=(${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"})
    memory=$("${ask[@]}" 2>/dev/null) || memory=
    [ "${CUDA_VISIBLE_DEVICES-all}" ] || memory=  # set, but to nothing
    gpus=$(grep -c '^[0-9]' <<< "$memory") || :
    # MiB of the 1, 2, 4 or 8 GPUs that share a batch. Cards below 40 GB do not count: each must
    # hold embeddings and logits alone.
    memory=$(awk '$1 >= 40000 { n++; sum += $1 }
        END { for (used = 1; 2 * used <= n && used < 8;) used *= 2
              print int(n ? sum / n * used : 0) }' <<< "$memory")
    if [ -n "${PROFILE:-}" ]; then
        why="as asked"
    elif [ -n "${MODEL:-}${DATA_DIR:-}" ]; then
        PROFILE=embedded why="MODEL or DATA_DIR is given"
    elif [ "$memory" -lt 100000 ]; then
        PROFILE=embedded why="no GPUs have the 100 GB that full training of a 7B model takes"
    elif ! "${PYTHON:-python3}" -c "import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=9)" "$hub" 2>/dev/null; then
        PROFILE=embedded why="the hub does not answer"
    else
        PROFILE=paper why="GPUs with $memory MiB share a batch, and the hub answers"
    fi
    [ -f "data/$PROFILE.sh" ] || fail "PROFILE=$PROFILE: choose embedded or paper"
}

check_gpus() {  # fail if nvidia-smi shows GPUs that torch cannot use: a CPU would take months
    [ "$gpus" = 0 ] || python -c "import torch; assert torch.cuda.is_available()" 2>/dev/null ||
        fail "torch cannot use the GPUs that nvidia-smi shows. Install a torch for their driver," \
            "or set CUDA_VISIBLE_DEVICES= to use the CPU"
}

choose_nproc() {  # set NPROC, if it is not: as many GPUs as share the smallest batch evenly
    if [ -z "${NPROC:-}" ]; then
        NPROC=$((gpus > 1 ? gpus : 1))
        while ((accumulated % NPROC)); do
            NPROC=$((NPROC - 1))
        done
    fi
    [[ $NPROC =~ ^[1-9][0-9]{0,3}$ ]] || fail "NPROC=$NPROC: must be a number of processes"
    case " ${methods[*]} " in
        *" gmt "*) ((accumulated % NPROC == 0)) ||
            fail "NPROC=$NPROC: gmt needs a divisor of its $accumulated sequences. Change it" ;;
    esac
}

read_lists() {  # split METHODS, RATIOS and TASKS into words, and see what follows from the values
    [[ ${FLASH_ATTN:-0} = [01] ]] || fail "FLASH_ATTN=$FLASH_ATTN: choose 0 or 1"
    read -rd '' -a methods <<< "${METHODS-fft ssu-wanda}" || :  # of several lines, too
    choose_nproc
    read -rd '' -a ratios <<< "${RATIOS:-0.5}" || :
    local i ratio
    for i in "${!ratios[@]}"; do  # .50 is 0.5, as in the names that plan.py expects
        if ratio=$(LC_ALL=C printf %g "${ratios[i]}" 2>/dev/null); then ratios[i]=$ratio; fi
    done
    read -rd '' -a tasks <<< "${TASKS//,/ }" || :
    evaluate_tasks= chat_tasks= score_inputs=() dtype=float32
    chat_inputs=(evaluate.py tools/{answers,judged}.py)  # what chat_eval.py is made of
    local task
    for task in "${tasks[@]}"; do
        case $task in
            t3) chat_tasks+=,t3 chat_inputs+=("$en/t3.jsonl") ;;  # no other task reads it
            chat|ifeval|gsm8k|ae2|codemix|mtb) chat_tasks+=,$task ;;
            *) evaluate_tasks+=,$task ;;
        esac
    done
    case $PRECISION in bf16*) dtype=bfloat16 ;; esac
    calibration+=(--dtype "$dtype")
    local method
    for method in "${methods[@]}"; do
        case $method:$CALIBRATION in
            *:tulu | *:alpaca) ;;
            fft:* | adalora:* | hft:* | gmt:* | lota*:* | s2ft-*:* | ssu-rand:* | ssu-mag:*) ;;
            *) score_inputs=("$CALIBRATION") ;;  # the others read calibration text
        esac
    done
}

sha256_of() {  # FILE or FOLDER: the digest of the file, or of all files but the model card
    find -L "$1" -maxdepth 1 -type f ! -name README.md -print0 | LC_ALL=C sort -z |
        xargs -0 cat | sha256sum
}

require() {  # FILE...: fail unless all are there and not empty
    local file
    for file in "$@"; do
        [ -s "$file" ] || fail "$file is missing or empty. See data/README.md"
    done
}

run() {  # COMMAND...: run it in a process group of its own, so that a signal ends all of it
    local code=0
    echo "+ $*"
    set -m
    "$@" &
    child=$!
    set +m
    wait "$child" || code=$?
    child=
    if [ "$code" != 0 ]; then
        if [ "$1" = torchrun ]; then set -- torchrun "${@:4}"; fi  # without its own options
        echo "run_all.sh: error: $1 $2 ended with $code" >&2
        exit "$code"
    fi
}

prompt_files=(data/{evaluation,instruct,models}.py)  # what writes the prompts
save_prompts() {  # write the prompts' words, so that another language changes none
    prompt_files+=("$dir/prompts.json")
    python -c "import json, sys
languages = json.load(open('data/languages.json', encoding='utf-8'))
json.dump([languages['en'], languages[sys.argv[1]]], sys.stdout, indent=1)" "$lang" \
        > "$dir/prompts.json"
}
several=(train.py score.py evaluate.py)  # the stages that several processes can run
launch() {  # python SCRIPT OPTION...: run a stage, by NPROC processes if it can
    local processes=1
    [[ " ${several[*]} " != *" $2 "* ]] || processes=$NPROC
    case " $* " in
        *" --adalora "*|*" --precision fp16 "*) processes=1 ;;  # train.py refuses more
        *" --gmt-ratio "*)  # the processes share each micro-batch
            set -- "$@" --micro-batch-size "$((accumulated / processes))" ;;
    esac
    if [ "$processes" -gt 1 ]; then
        # Ranks wait while the first one downloads and tokenizes, which counts as silence.
        run torchrun --standalone --nproc_per_node="$processes" "${@:2}" --timeout 120
    else
        run "$@"
    fi
}

prepare_embedded() {  # make the model and the texts of the embedded profile, unless this made them
    local stamp=data/embedded/.made-by key
    key=$(cat data/prepare_embedded.py data/udhr.jsonl {data/,}requirements.txt | sha256sum)
    if [ ! -e data/embedded/provenance.json ] || [ ! -e data/embedded/model/model.safetensors ] ||
        [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        run python data/prepare_embedded.py  # knows its own files, and overwrites no others
        echo "$key" > "$stamp"
    fi
}

# stage OUTPUT INPUT... -- COMMAND...: make OUTPUT, unless the same command made it from the same
# inputs. A stamp beside OUTPUT, written before the command starts, says which those were: in its
# first line as a digest, in its second by profile, data and model. The third is the digest of
# OUTPUT: what is made from it has the stamp as an input.
stage() {
    local output=$1 stamp=$1.made-by checkpoint=${1%/model}/checkpoint key complete inputs=()
    local made_from=$PROFILE:$DATA_DIR:$MODEL
    shift
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    key=$({ printf '%s\n' "$@" "${model_sha256:-}"
        cat "$2" requirements.txt "${inputs[@]}"; } | sha256sum)
    if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$key" ]; then
        if [ -e "$output" ] || [ -e "$checkpoint" ]; then
            # Only what has a stamp is deleted, and not even that where it may have taken days: in
            # the paper profile, and models made from data or a model of your own.
            [ -e "$stamp" ] || fail "run_all.sh did not make $output. Move it away, or set RUNS"
            case $(sed -n 2p "$stamp"):$output in
                embedded:data/embedded:data/embedded/model:*) ;;
                paper:* | *:*/model)
                    fail "$output was made with other settings or inputs. Set RUNS, or delete it" ;;
            esac
        fi
        rm -rf "$output" "$checkpoint"
        mkdir -p "$(dirname "$output")"
        printf '%s\n' "$key" "$made_from" > "$stamp"
    fi
    if [ -e "$output" ]; then
        echo "done before: $output"
        return
    fi
    complete=$(find "$checkpoint" -path '*[0-9]/checkpoint.json' 2>/dev/null) || :
    if [ -n "$complete" ]; then set -- "$@" --resume; fi
    launch "$@"
    [ -e "$output" ] || fail "$1 $2 did not make $output"
    printf '%s\n' "$key" "$made_from" "$(sha256_of "$output")" > "$stamp"
}
