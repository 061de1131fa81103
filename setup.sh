# Sourced by run_all.sh and tests/run.sh: `. ./setup.sh FILE...` makes .venv (or takes the active venv) and installs the
# pinned requirements FILE... into it, once. data/requirements.txt lists its own dependencies, so it goes in without any.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || "${PYTHON:-python3}" -m venv --clear .venv
    . .venv/bin/activate
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: error: needs Python 3.11 or newer: delete .venv and set PYTHON=/path/to/python3" >&2; exit 2; }
for requirements in "$@"; do
    stamp=$VIRTUAL_ENV/.installed-${requirements//\//-}
    cmp -s "$requirements" "$stamp" && continue
    echo "setup: installing $requirements into $VIRTUAL_ENV"
    case $requirements in data/*) alone=--no-deps ;; *) alone= ;; esac
    python -m pip install --quiet --disable-pip-version-check $alone -r "$requirements"
    cp "$requirements" "$stamp"
done
# flash-attn is compiled here, so it needs an NVIDIA GPU and nvcc; without it PyTorch's own attention (SDPA) does the same.
if [ -z "${dry_run:-}" ] && [ ! -e "$VIRTUAL_ENV/.flash-attn-tried" ]; then
    if command -v nvcc >/dev/null && nvidia-smi >/dev/null 2>&1; then
        echo "setup: compiling flash-attn, which can take an hour"
        { python -m pip install --quiet ninja packaging wheel &&
          python -m pip install --no-build-isolation flash-attn==2.8.3; } || echo "setup: flash-attn did not build; using SDPA"
    else
        echo "setup: no NVIDIA GPU with nvcc, so no flash-attn; attention is PyTorch's SDPA"
    fi
    touch "$VIRTUAL_ENV/.flash-attn-tried"
fi
# glibc hands freed tensors back to the kernel and faults their pages in again. Keeping them made training 1.6 times as
# fast on two AMD EPYC cores (SmolLM2-135M, 8 x 128 tokens a step).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export HF_HUB_DISABLE_TELEMETRY=1
# On a GPU: memory freed by activations can be had again in other sizes, as the moments need in the first step.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
