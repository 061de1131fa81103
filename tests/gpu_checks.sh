#!/usr/bin/env bash
# Check on one GPU of 80 GB what a CPU cannot show, and print one table. Weights are random, and
# nothing is downloaded.
#
#   bash tests/gpu_checks.sh                        with the `python3` that has torch (PYTHON=...)
#   WHEELS=folder bash tests/gpu_checks.sh          packages to add: datasets, dill, multiprocess
#   bash tests/gpu_checks.sh --tiny                 the same on a CPU, with tiny shapes
#
# It needs torch 2.11 and transformers 5.17 or newer, datasets, pytest, sacrebleu, xxhash, and for
# one check each peft and torchao (with gcc and python3-dev). A check that fails is a row of the
# table, and the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=cuda shapes=(1B 7B)
size=(--batch-size 32 --seq-len 512 --steps 4)
if [ "${1:-}" = --tiny ]; then
    device=cpu shapes=(tiny tiny)
    size=(--batch-size 8 --seq-len 64 --steps 3)
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONPATH=$work/site:$PWD:$PWD/tests
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl || exit 2
fi
"$python" - "$device" << 'END' || exit 2
import importlib.util, sys
import torch, transformers
names = ("datasets", "pytest", "sacrebleu", "xxhash", "pyarrow")
if missing := [name for name in names if not importlib.util.find_spec(name)]:
    sys.exit(f"gpu_checks.sh: error: {' '.join(missing)} not installed. Set WHEELS, see above")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu_checks.sh: error: torch sees no GPU. Use --tiny for a dry run on a CPU")
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU, tiny shapes"
print(f"{name}; torch {torch.__version__}; transformers {transformers.__version__}")
END

failed=0
row() {  # CELL...: a line of the table
    local cells
    printf -v cells ' %s |' "$@"
    echo "|$cells" >> "$work/table"
}
check() {  # NAME SECONDS COMMAND...: a row with the last line that the command prints
    local name=$1 seconds=$2 code=0 began=$SECONDS
    shift 2
    echo "$name ..."
    timeout "$seconds" "$@" > "$work/log" 2>&1 || code=$?
    if [ "$code" != 0 ]; then
        failed=1
        echo "--- $name: exit code $code"
        tail -n 30 "$work/log"
        row "$name" FAILED "$(grep -v '^ *$' "$work/log" | tail -n 1 | cut -c1-150 | tr '|' '/')"
    else
        row "$name" "$((SECONDS - began)) s" "$(tail -n 1 "$work/log" | tr '|' ' ')"
    fi
}
row check time result
row --- --- ---

# Fast tests with train.py and score.py on the device, in fp32, whose tolerances they have. A process
# that has used a GPU cannot fork, so the tests that do are left out.
cat > "$work/on_device.py" << 'END'
import os


def pytest_collection_modifyitems():
    import score
    import test_train

    parse_args = score.parse_args
    score.parse_args = lambda argv: parse_args(["--dtype", "float32", *argv])
    test_train.TINY[test_train.TINY.index("cpu")] = os.environ["CHECK_DEVICE"]
END
some="frozen_weights_stay_and_the_others_move or fp16_leaves_out"
some+=" or chat_tokens or masked_update_equals or adalora_merged or bf16_source_is_saved"
some+=" or gmt_keeps_the_largest"
tests=("$python" -m pytest -q -c tests/pytest.ini -p on_device -m "not slow")
export CHECK_DEVICE=$device
PYTHONPATH=$work:$PYTHONPATH check "fast tests: train.py" 150 \
    "${tests[@]}" -k "$some" tests/test_train.py tests/test_compact.py
PYTHONPATH=$work:$PYTHONPATH check "fast tests: score.py" 100 \
    "${tests[@]}" -k "not full_disk and not interrupt" tests/test_score.py

# Memory and speed of training, with the most that tools/plan.py expects PyTorch to allocate.
cat > "$work/training.py" << 'END'
import json, subprocess, sys
import torch
from transformers import AutoModelForCausalLM
import bench_train
from tools import memory

shape, way, *options = sys.argv[1:]
command = [sys.executable, "tests/bench_train.py", "--shape", shape, "--worker", way, *options]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode:
    sys.exit(done.stderr)
found = json.loads(done.stdout.splitlines()[-1])
value = dict(zip(options, options[1:]))
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(bench_train.SHAPES[shape])
sizes = {name: p.numel() for name, p in model.named_parameters()}
tokens = int(value["--micro-batch-size"]) * int(value["--seq-len"])
_, planned = memory.bytes_per_gpu(
    (model.config, sizes, memory.trained_fractions(model, 0.5)),
    "bf16-true" if way == "bf16-true" else "bf16",
    way != "masked",
    1,
    tokens,
    "--gradient-checkpointing" in options,
)
speed = int(value["--batch-size"]) * int(value["--seq-len"]) / found["seconds"]
said = f"{speed:,.0f} tokens/s, peak {found['bytes'] / 1e9:.1f} GB"
said += f" of {(planned - memory.ALLOWANCE) / 1e9:.1f} planned"
if torch.cuda.is_available():
    card = torch.cuda.get_device_name()
    for name, peak in bench_train.PEAKS.items():
        if name in card:
            said += f", MFU {speed * found['flops'] / peak:.1%}"
print(said)
END
train() {  # SHAPE WAY MICRO_BATCH OPTION...
    check "train $1 $2, micro-batch $3 ${*:4}" 150 "$python" "$work/training.py" "$1" "$2" \
        --device "$device" --micro-batch-size "$3" "${size[@]}" "${@:4}"
}
for way in masked compact bf16-true; do
    train "${shapes[0]}" "$way" 8
done
train "${shapes[1]}" compact 1 --gradient-checkpointing
train "${shapes[1]}" bf16-true 4 --gradient-checkpointing
if command -v g++ clang++ c++ > /dev/null; then
    train "${shapes[0]}" masked 8 --compile
else
    row "train ${shapes[0]} masked --compile" "-" "no C++ compiler"
fi

# A run that is killed after its checkpoint, and resumed. A GPU need not give the same bits.
cat > "$work/resume.py" << 'END'
import json, subprocess, sys, tempfile, time
from pathlib import Path
import make_mask, score
from conftest import TEXT, tiny_model, write_jsonl
from variants import files

device, *options = sys.argv[1:]
folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent))
text = write_jsonl(folder / "text.jsonl", [{"text": f"{i} {TEXT[i % 5]}"} for i in range(400)])
model = tiny_model(folder / "source", hidden_size=128, intermediate_size=256)
if "--gmt-ratio" not in options:
    scores, mask = folder / "scores.safetensors", folder / "mask.safetensors"
    score.main(["--model", str(model), "--method", "random", "--out", str(scores)])
    make_mask.main(["--scores", str(scores), "--out", str(mask)])
    options += ["--mask", str(mask)]
command = [sys.executable, "train.py", "--model", str(model), "--data", str(text), *options]
command += ["--device", device, "--lr", "1e-3", "--seq-len", "32", "--batch-size", "8"]
command += ["--steps", "300", "--save-every", "150", "--log-every", "1", "--out"]
log = open(folder / "log", "w")


def start(out, *more):
    return subprocess.Popen([*command, str(folder / out), *more], stdout=log, stderr=log)


def losses(out):
    lines = map(json.loads, (folder / out / "train.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


whole, broken = start("whole"), start("broken")
while broken.poll() is None and not files.newest_checkpoint(folder / "broken"):
    time.sleep(0.01)
broken.kill()
if whole.wait() or broken.wait() != -9 or start("broken", "--resume").wait():
    sys.exit((folder / "log").read_text())
one, other = losses("whole"), losses("broken")
apart = max(abs(a - b) / b for a, b in zip(one, other, strict=True))
if apart > 0.02:
    sys.exit(f"losses differ by {apart:.1%} from those of a run that was not killed")
print(f"{len(one)} losses, {one[0]:.3f} to {one[-1]:.3f}, within {apart:.0e} of a whole run's")
END
resume() {  # OPTION...
    check "killed and resumed, $*" 150 "$python" "$work/resume.py" "$device" "$@"
}
resume --precision bf16
resume --precision bf16-true --compact
resume --precision bf16 --gmt-ratio 0.5
if "$python" -c "import torchao" 2> /dev/null; then
    resume --precision bf16-true --compact --optimizer adamw8bit
else
    row "killed and resumed, --optimizer adamw8bit" "-" "no torchao"
fi

# fp16, then one process under torchrun, with fully_shard and without. It exchanges nothing over NCCL.
scaling=("$python" tests/bench_scaling.py --device "$device" --shape "${shapes[0]}" "${size[@]}"
    --micro-batch-size 4 --ranks 1 --rounds 1)
check "train ${shapes[0]} masked, fp16" 100 "${scaling[@]}" --precision fp16
check "torchrun, fully_shard on one GPU, ${shapes[0]}" 150 \
    "${scaling[@]}" --precision bf16 --compare-shard

# Attention, and evaluation in batches.
cat > "$work/attention.py" << 'END'
import sys
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
import bench_train

device, shape = sys.argv[1:]
torch.manual_seed(0)
config = bench_train.SHAPES[shape]
with torch.device(device):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    ids = torch.randint(0, config.vocab_size, (2, 64 if device == "cpu" else 512))
found = {}
for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    with sdpa_kernel(backend):  # raises if the kernel cannot be used
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = sum(p.grad.float().pow(2).sum() for p in model.parameters()).sqrt()
    found[backend] = loss.item(), norm.item()
(loss, norm), (other, other_norm) = found.values()
if abs(loss - other) > 0.01 * other or abs(norm - other_norm) > 0.02 * other_norm:
    sys.exit(f"flash: loss {loss}, norm {norm}; math: {other}, {other_norm}")
print(f"runs forward and backward; loss {loss:.4f}, math kernel {other:.4f}")
END
check "SDPA's flash kernel ${shapes[0]}" 60 "$python" "$work/attention.py" "$device" "${shapes[0]}"

cat > "$work/batches.py" << 'END'
import sys, time
import torch
from transformers import AutoModelForCausalLM
import bench_train, evaluate

device, shape, dtype = sys.argv[1:]
torch.manual_seed(0)
config = bench_train.SHAPES[shape]
with torch.device(device):
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
prompts = [torch.randint(1, config.vocab_size, (20 + i,)).tolist() for i in range(16)]
rows = [(prompt, prompt[:5]) for prompt in prompts]


def timed(function, *args):
    began = time.perf_counter()
    found = function(*args)  # lists: it has waited for the device
    return found, time.perf_counter() - began


def one_by_one():
    sums = [evaluate.loglik(model, [row])[0] for row in rows]
    return sums, [evaluate.generate(model, [p], 24, [], evaluate.GREEDY)[0][0] for p in prompts]


def together():
    texts = evaluate.generate(model, prompts, 24, [], evaluate.GREEDY)[0]
    return evaluate.loglik(model, rows), texts


with torch.inference_mode():
    together()
    (sums, texts), fast = timed(together)
    (others, other_texts), slow = timed(one_by_one)
apart = max(abs(a - b) / abs(b) for a, b in zip(sums, others))
differ = sum(a != b for a, b in zip(texts, other_texts))
if apart > {"float32": 1e-4, "bfloat16": 0.02}[dtype] or (dtype == "float32" and differ > 2):
    sys.exit(f"log-likelihoods differ by {apart:.1e}, {differ} of {len(texts)} answers differ")
print(f"{slow / fast:.1f} times as fast as one by one; log-likelihoods within {apart:.0e}, "
      f"{differ} of {len(texts)} answers differ")
END
for dtype in float32 bfloat16; do
    check "evaluation in batches ${shapes[0]}, $dtype" 90 \
        "$python" "$work/batches.py" "$device" "${shapes[0]}" "$dtype"
done

echo
cat "$work/table"
exit "$failed"
