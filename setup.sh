# Sourced by run_all.sh and tests/run.sh: `. ./setup.sh FILE...` makes .venv (or takes the active
# virtual environment) and installs the pinned requirements FILE... into it, once.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || "${PYTHON:-python3}" -m venv --clear .venv
    . .venv/bin/activate
    if ! [ "$VIRTUAL_ENV" -ef .venv ]; then
        echo "setup: error: .venv was made in another folder. Delete it, and start again" >&2
        exit 2
    fi
fi
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: error: Python is older than 3.11. Delete .venv and set PYTHON to a newer one" >&2
    exit 2
fi

# Python compiles what is imported, once. pip would compile all, which takes half a minute.
unset PYTHONDONTWRITEBYTECODE
install() {  # PACKAGE...: install with pip, quietly
    echo "setup: installing $* into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}
optional() {  # PACKAGE CHECK: install what only some methods and tasks need, if CHECK fails
    python -c "$2" 2>/dev/null || install "$1"
}
install_for() {  # NAME...: install what only some methods and tasks of run_all.sh need
    local name
    for name in "$@"; do
        case $name in
            adalora) optional peft==0.21.2 "import peft; assert peft.__version__ == '0.21.2'" ;;
            adamw8bit*) optional torchao==0.18.0 \
                "from importlib.metadata import version; assert version('torchao') == '0.18.0'" ;;
            codemix) [ "$LANGUAGE_ID" = script ] ||
                optional fasttext-numpy2==0.10.4 "import fasttext" ;;
            ifeval|gsm8k) optional "lm-eval[hf,ifeval]==0.4.13" \
                "import lm_eval.models.huggingface, nltk, langdetect, immutabledict" ;;
        esac
    done
}

for requirements in "$@"; do
    stamp=$VIRTUAL_ENV/.installed-${requirements//\//-}
    cmp -s "$requirements" "$stamp" && continue
    case $requirements in
        data/*) install --no-deps -r "$requirements" ;;  # it lists its own dependencies
        *) install -r "$requirements" ;;
    esac
    cp "$requirements" "$stamp"
done

# PyTorch's own attention (SDPA) has a flash kernel, so flash-attn is installed only when asked for.
# Without a wheel that fits, pip compiles it, which can take an hour and needs nvcc.
if [ "${FLASH_ATTN:-0}" = 1 ]; then
    optional ninja==1.13.0 "import ninja"
    python -c 'import flash_attn' 2>/dev/null || install --no-build-isolation flash-attn==2.8.3
fi

# glibc hands freed tensors back to the kernel and faults their pages in again. Keeping them made
# training 1.6 times as fast on two AMD EPYC cores (SmolLM2-135M, 8 x 128 tokens a step).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export HF_HUB_DISABLE_TELEMETRY=1
# On a GPU, memory that activations free can be used again in other sizes.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
