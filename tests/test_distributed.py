"""train.py under torchrun on gloo: the run of one process, whatever the number of ranks."""

import io
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick_python
import torch
from conftest import ROOT, forked
from safetensors.torch import load_file, save_file
from test_architectures import SCORED, build
from test_train import arguments, log_of, make_masks, static_mask, weights
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from variants import compact, distributed, files

RUN = ["--steps", "8", "--weight-decay", "0.1", "--micro-batch-size", "1"]


def torchrun(ranks, *argv, script="train.py", **options):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(ROOT / script), *map(str, argv)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(process, code=0):
    out, err = process.communicate(timeout=240)
    assert (process.returncode == 0) == (code == 0), err[-3000:]
    return out, err


def distance(a, b):
    """The norm of the difference of two sets of weights, relative to their norm."""
    difference = sum((a[name].double() - b[name].double()).pow(2).sum() for name in b)
    return (difference / sum(b[name].double().pow(2).sum() for name in b)).sqrt().item()


def frozen_weights_are_those_of(source, trained, mask):
    before = load_file(source / "model.safetensors")
    for name, update in load_file(mask).items():
        keep = update.expand(before[name].shape) == 0
        assert torch.equal(before[name][keep], trained[name][keep]), name


def test_the_dtype_of_the_source_is_known_after_the_model_is_built():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, dtype=torch.bfloat16)
    model = distributed.empty_model(config, dtype=torch.float32)
    assert model.dtype == torch.float32 and config.dtype == torch.bfloat16


def test_text_that_a_locale_has_not_is_spelled_out(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    distributed.quiet()
    print("ने", flush=True)
    assert written.getvalue() == b"\\u0928\\u0947\n"


def test_weights_that_files_untie_are_refused(llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "m")
    state = load_file(llama / "model.safetensors")
    model = distributed.empty_model(LlamaConfig.from_pretrained(llama), dtype=torch.float32)
    for change in (0.0, 1.0):
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + change
        save_file(state, tmp_path / "m/model.safetensors", {"format": "pt"})
        if change:
            with pytest.raises(SystemExit):
                distributed.check_tied(model, "m", tmp_path / "m")
        else:
            distributed.check_tied(model, "m", tmp_path / "m")
    assert "lm_head.weight and model.embed_tokens.weight differ" in capsys.readouterr().err


def test_a_tensor_in_two_files_is_refused(llama, tmp_path, capsys):
    """transformers reads one of the files, torch.distributed.checkpoint all."""
    shutil.copytree(llama, tmp_path / "m")
    distributed.check_files("m", tmp_path / "m")
    norm = load_file(llama / "model.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": 2 * norm}, tmp_path / "m/model.fp16.safetensors")
    with pytest.raises(SystemExit):
        distributed.check_files("m", tmp_path / "m")
    assert "both hold model.norm.weight. Remove one" in capsys.readouterr().err
    pid = forked(lambda argv: compare_with_files(*argv), [tmp_path / "m"])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


def test_a_rank_without_torchrun_is_the_only_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "16")  # of a LoRA, for instance
    monkeypatch.setenv("LOCAL_RANK", "16")
    found = runpy.run_path(distributed.__file__)
    assert (found["WORLD"], found["RANK"], found["LOCAL_RANK"]) == (1, 0, 0)


def test_ctrl_c_in_a_checkpoint_stays_one():
    for error, kind in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError("full"), OSError)):
        with pytest.raises(kind), distributed.one_error():
            raise CheckpointException("write", {0: (error, None)})


def compare_with_files(folder):
    """Fill a sharded model from its files, in a group of one rank, and compare all its tensors."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sharded = distributed.empty_model(whole.config, dtype=torch.float32)
    distributed.shard(sharded, "bf16")
    distributed.fill(sharded, "cpu", folder, Path(folder))
    found = dict(sharded.named_buffers()) | dict(sharded.named_parameters())
    expected = dict(whole.named_buffers()) | dict(whole.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(distributed.full(found[name]), tensor), name


def compare_compact(folder, mask):
    """Fill a compact model without weights, in a group of one rank, and compare all its tensors."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sharded = distributed.empty_model(whole.config, dtype=torch.float32)
    masks = files.load_masks(Path(mask), whole)
    for model in (whole, sharded):
        compact.make_compact(model, masks, "bf16")
    distributed.shard(sharded, "bf16")
    source = distributed.fill(sharded, "cpu", folder, Path(folder))
    for module in sharded.modules():
        if isinstance(module, compact.CompactLinear):
            module.index.zero_()
    compact.fill_columns(sharded, masks, source)
    found = dict(sharded.named_buffers()) | dict(sharded.named_parameters())
    expected = dict(whole.named_buffers()) | dict(whole.named_parameters())
    assert found.keys() == expected.keys() and any(name.endswith(".index") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(distributed.full(found[name]), tensor), name


def test_a_compact_model_of_several_ranks_trains_the_columns_of_the_mask(olmo2, chats, tmp_path):
    mask = make_masks(olmo2, chats, tmp_path)
    pid = forked(lambda argv: compare_compact(*argv), [olmo2, mask])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_model_is_too_large_for_a_ranks_part_of_the_memory(olmo2, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(olmo2)
    size = 2 * sum(p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(distributed, "FULL", 3 * size / memory)  # of the memory of one process
    for world, dtype, too_large in (
        (1, torch.bfloat16, False),
        (2, torch.bfloat16, False),
        (4, torch.bfloat16, True),
        (2, torch.float32, True),
    ):
        monkeypatch.setattr(distributed, "WORLD", world)
        assert distributed.is_too_large(model, dtype, "cpu") == too_large


@pytest.mark.parametrize("kind", ["apertus", "diffllama"])
def test_a_sharded_model_is_that_of_the_files(kind, tmp_path):
    """With buffers that the files hold (Apertus), and norms without weights (DiffLlama)."""
    model = build(tmp_path / "m", *SCORED[kind])
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith((".beta", ".eps")):
            tensors[name] += 0.25
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    pid = forked(lambda argv: compare_with_files(*argv), [model])  # a group ends with its process
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    "error,message",
    [
        (torch.distributed.DistBackendError("timed out"), "another rank has ended, or was silent"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            "another rank",
        ),
        (RuntimeError("of ours"), "Traceback"),
    ],
)
def test_that_another_rank_is_gone_is_one_line(error, message, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "STDERR", sys.stderr)
    distributed.show(type(error), error, None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(error) in said
    assert message == "Traceback" or f"train.py: error: {message}" in said


@pytest.mark.parametrize(
    "more,message",
    [
        (["--batch-size", "3"], "--batch-size 3: not a multiple of the 2 ranks"),
        (["--precision", "fp16"], "--precision fp16 run in one process"),
        (["--adalora"], "--adalora and"),
        (["--timeout", "0"], "--timeout 0.0: not a number of minutes"),
        (["--timeout", "nan"], "--timeout nan: not a number of minutes"),
        (["--timeout", "1e6"], "--timeout 1000000.0: not a number of minutes"),
        ([], "WORLD_SIZE is 2, but not by torchrun"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_several_ranks_cannot_do_is_refused_by_the_first(
    more, message, olmo2, text, tmp_path, refused, monkeypatch
):
    monkeypatch.setattr(distributed, "WORLD", 2)
    line = refused(train.main, *arguments(olmo2, text, tmp_path / "out", *more))
    assert message in line and not (tmp_path / "out").exists()


@pytest.fixture()
def quick(tmp_path):
    server = quick_python.start(tmp_path)
    yield str(tmp_path / "python")
    quick_python.stop(server)


def start_ranks(python, count, *argv, script="train.py", **options):
    """Start what torchrun would start, without its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [python, str(ROOT / script), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = []
    for rank in map(str, range(count)):
        environment = os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, **pipes, **options))
    return ranks


@pytest.mark.parametrize(
    "kind,count,precision",
    [
        ("olmo2", 2, "fp32"),
        pytest.param("llama", 4, "fp32", marks=pytest.mark.slow),
        pytest.param("qwen2", 2, "fp32", marks=pytest.mark.slow),
        pytest.param("olmo2", 2, "bf16", marks=pytest.mark.slow),
        pytest.param("qwen2", 4, "bf16", marks=pytest.mark.slow),
        pytest.param("olmo2", 4, "bf16-true", marks=pytest.mark.slow),
    ],
)
def test_ranks_make_the_run_of_one(kind, count, precision, chats, text, tmp_path, quick, request):
    """Less apart than two runs of one process that add up gradients in another order."""
    model = request.getfixturevalue(kind)
    mask = make_masks(model, chats, tmp_path)
    more = [*RUN, "--mask", mask, "--source-eval", chats, "--precision", precision]
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    ranks = start_ranks(quick, count, *arguments(model, text, tmp_path / "many", *more))
    train.main(arguments(model, text, tmp_path / "one", *more))
    train.main(arguments(model, text, tmp_path / "other", *more, "--micro-batch-size", "4"))
    (out, _), *others = (finished(process) for process in ranks)
    one, many, other = (weights(tmp_path / name) for name in ("one", "many", "other"))
    assert distance(many, one) < 3 * distance(other, one)
    frozen_weights_are_those_of(model, many, mask)
    logs = [log_of(tmp_path / name) for name in ("one", "many")]
    for line, same in zip(*(log[1:-1] for log in logs), strict=True):
        assert same.get("loss") == pytest.approx(line.get("loss"), abs=tolerance)
        norms = [log.get("grad_norm", 0) for log in (line, same)]
        assert norms[1] == pytest.approx(norms[0], rel=100 * tolerance)
        assert same.get("tokens") == line.get("tokens")
    for key in ("frozen_verified", "trainable"):
        assert logs[0][-1]["summary"][key] == logs[1][-1]["summary"][key]
    assert "verified:" in out and not any(silent for silent, _ in others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["olmo2", "llama", "qwen2"])
@pytest.mark.parametrize(
    "method", ["wanda", "wanda-row", "wanda-element", "hft", "compact", "fft", "gmt", "recompute"]
)
def test_the_loop_in_float64(method, kind, chats, text, tmp_path, quick, request):
    model = request.getfixturevalue(kind)
    more = [*RUN, "--batch-size", "8"]
    if method == "gmt":
        more += ["--gmt-ratio", "0.5"]
    elif method == "recompute":
        more += ["--gradient-checkpointing"]
    elif method == "compact":
        more += ["--compact", "--mask", static_mask("wanda", model, chats, tmp_path / "mask")]
    elif method != "fft":
        more += ["--mask", static_mask(method, model, chats, tmp_path / "mask")]
    found = {}
    for count in (1, 2, 4):
        kept = tmp_path / f"{count}.safetensors"
        # GMT cuts the gradients of a micro-batch, which all ranks share.
        size = ["--micro-batch-size", 4 // count]
        argv = arguments(model, text, tmp_path / str(count), *more, *size)
        ranks = start_ranks(quick, count, kept, *argv, script="tests/rank_in_double.py")
        for process in ranks:
            finished(process)
        found[count] = load_file(kept)
    assert distance(found[2], found[1]) < 1e-12 and distance(found[4], found[1]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
@pytest.mark.parametrize("more", [[], ["--compact"]], ids=" ".join)
def test_frozen_bits_in_bf16(precision, more, llama, chats, text, tmp_path, quick):
    mask = make_masks(llama, chats, tmp_path)
    more = [*RUN, *more, "--mask", mask, "--precision", precision]
    for process in start_ranks(quick, 2, *arguments(llama, text, tmp_path / "out", *more)):
        finished(process)
    frozen_weights_are_those_of(llama, weights(tmp_path / "out"), mask)


@pytest.mark.slow
@pytest.mark.parametrize("first,second", [(2, 1), (1, 2), (2, 4), (2, 2)])
@pytest.mark.parametrize("more", [[], ["--compact"]], ids=" ".join)
def test_resume_with_any_number_of_ranks(first, second, more, olmo2, chats, text, tmp_path, quick):
    """Killed after a checkpoint; as many ranks as before then give the same bits."""
    mask = make_masks(olmo2, chats, tmp_path)
    more = [*RUN, *more, "--mask", mask, "--save-every", "3", "--steps", "60"]
    out = tmp_path / "killed"
    ranks = start_ranks(quick, first, *arguments(olmo2, text, out, *more), process_group=0)
    while not files.newest_checkpoint(out):
        assert ranks[0].poll() is None, ranks[0].communicate()[1][-2000:]
        time.sleep(0.01)
    for process in ranks:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for process in start_ranks(quick, second, *arguments(olmo2, text, out, *more, "--resume")):
        resumed, _ = finished(process)
        assert not resumed or "resumed after step" in resumed
    whole = arguments(olmo2, text, tmp_path / "whole", *more)
    (said, _), *_ = map(finished, start_ranks(quick, first, *whole))
    assert said.count(": checkpoint saved in ") == 59 // 3
    killed, whole = weights(out), weights(tmp_path / "whole")
    frozen_weights_are_those_of(olmo2, killed, mask)
    if first == second:
        assert all(torch.equal(killed[name], whole[name]) for name in whole)
    else:
        assert distance(killed, whole) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_job(how, olmo2, text, tmp_path):
    more = [*RUN, "--steps", "100000", "--timeout", "0.1", "--save-every", "5"]
    process = torchrun(2, *arguments(olmo2, text, tmp_path / "out", *more))
    while not files.newest_checkpoint(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), how)
    _, err = finished(process, code=1)
    assert err.count("train.py: error:") <= 1  # torchrun may end the others before they see it
    assert how == signal.SIGKILL or "train.py: error: another rank has ended, or was" in err
    assert files.newest_checkpoint(tmp_path / "out")


@pytest.mark.slow
def test_what_several_ranks_cannot_do_is_refused(olmo2, text, tmp_path, quick):
    for more, message in (
        (["--batch-size", "3"], "not a multiple of the 2 ranks"),
        (["--precision", "fp16"], "one process"),
        (["--data", "nowhere.jsonl"], "no such file"),
    ):
        process, _ = start_ranks(quick, 2, *arguments(olmo2, text, tmp_path / "out", *more))
        _, err = finished(process, code=2)
        (line,) = [line for line in err.splitlines() if "train.py: error" in line]
        assert message in line
    assert not (tmp_path / "out").exists()


# ---- What one rank alone meets -------------------------------------------------------------------

GRADIENTS = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from transformers import AutoConfig, AutoModelForCausalLM

import train
from variants import distributed

folder, precision = Path(sys.argv[2]), sys.argv[3]
distributed.join("cpu", 1)
dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
shared = distributed.empty_model(AutoConfig.from_pretrained(folder), dtype=dtype)
distributed.shard(shared, precision)
distributed.fill(shared, "cpu", folder, folder)
tokens = torch.randint(3, 400, (1, 64), generator=torch.Generator().manual_seed(distributed.RANK))
for model in (whole, shared):
    with torch.autocast("cpu", torch.bfloat16, precision == "bf16", cache_enabled=False):
        loss = train.next_token_loss(model, tokens)
    loss.backward()
same = total = 0
for name, p in shared.named_parameters():
    if "proj" in name:
        mean = distributed.add_up(whole.get_parameter(name).grad.double()) / distributed.WORLD
        found = distributed.full(p.grad)
        same += (found == mean.to(found.dtype)).sum().item()
        total += found.numel()
print(same / total)
"""


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_gradients_of_bf16_are_added_up_over_ranks_in_fp32(precision, olmo2, tmp_path, quick):
    """Each rank's are those of a whole model on its text. Their mean is rounded once."""
    script = tmp_path / "train.py"
    script.write_text(GRADIENTS)
    (out, _), *_ = map(finished, start_ranks(quick, 4, ROOT, olmo2, precision, script=script))
    assert float(out.splitlines()[-1]) > 0.99


TURNS = """
import os, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = str(rank % 2)  # two ranks on each of two machines
sys.path.insert(0, sys.argv[1])
from variants import distributed

distributed.join("cpu", 1)
log = Path(sys.argv[2])
with distributed.rank_zero_first():
    began = time.monotonic()
    time.sleep(0.2)
    with open(log, "a") as file:
        file.write(f"{rank} {began} {time.monotonic()}\\n")
"""


def test_what_ranks_share_is_made_by_the_first_of_each_machine(tmp_path, quick):
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(TURNS)
    for process in start_ranks(quick, 4, ROOT, log, script=script):
        finished(process)
    times = {
        int(rank): (float(began), float(ended)) for rank, began, ended in map(str.split, log.open())
    }
    assert times.keys() == set(range(4))
    for first, then in ((0, 2), (2, 1), (2, 3)):
        assert times[first][1] <= times[then][0]


OTHER_MACHINE = """
import os, sys
os.environ["LOCAL_RANK"] = "0"
sys.path.insert(0, sys.argv[1])
import train

argv = sys.argv[4:]
if os.environ["RANK"] == "1":
    argv += sys.argv[2:4]
train.main(argv)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag,value,message",
    [
        ("--data", "other", "rank 1: data is"),
        ("--model", "llama", "rank 1: --model {llama}: not the files that rank 0 has"),
        ("--mask", "nowhere", "rank 1: --mask nowhere: cannot be read"),
        ("--lr", "0.5", "rank 1: lr is 0.5, but 0.01 on rank 0"),
        ("--save-every", "7", "rank 1: save_every is 7, but 0 on rank 0"),
    ],
)
def test_a_machine_with_other_files_or_options_is_said(
    flag, value, message, olmo2, llama, text, tmp_path, quick
):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(text.read_text(encoding="utf-8").splitlines(True)[:50]))
    value = {"other": other, "llama": llama}.get(value, value)
    script = tmp_path / "train.py"
    script.write_text(OTHER_MACHINE)
    argv = arguments(olmo2, text, tmp_path / "out", *RUN, "--timeout", "0.1")
    ranks = start_ranks(quick, 2, ROOT, flag, value, *argv, script=script)
    for process in ranks:
        _, err = process.communicate(timeout=60)
        assert process.returncode > 0
    assert f"train.py: error: {message.format(llama=llama)}" in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "out/model").exists()


NOT_FINITE = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from torch.distributed.fsdp import fully_shard
from variants import distributed, files

distributed.join("cpu", 1)
distributed.quiet()
model = torch.nn.Linear(4, 4)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
scaler = torch.amp.GradScaler("cpu", enabled=False)
files.save_checkpoint(Path(sys.argv[2]), 1, model, optimizer, scaler, {})
if distributed.RANK == 1:
    torch.nn.init.constant_(model.weight.to_local(), float("inf"))
files.save_checkpoint(Path(sys.argv[2]), 2, model, optimizer, scaler, {})
"""


@pytest.mark.slow
def test_a_checkpoint_with_infinity_on_one_rank_is_refused_by_all(tmp_path, quick):
    script = tmp_path / "train.py"
    script.write_text(NOT_FINITE)
    zero, one = start_ranks(quick, 2, ROOT, tmp_path / "out", script=script)
    out, err = zero.communicate(timeout=60)
    one.communicate(timeout=60)
    assert (zero.returncode, one.returncode) == (2, 2)
    assert "step 1: checkpoint saved in" in out and "step 2: weights are not finite" in err
    assert files.newest_checkpoint(tmp_path / "out").name == "step-1"


FULL_DISK = """
import os, resource, sys
sys.path.insert(0, sys.argv[1])
if os.environ["RANK"] == sys.argv[2]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import train

train.main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_full_disk_on_one_rank_is_one_line(rank, olmo2, text, tmp_path, quick):
    more = [*RUN, "--save-every", "5", "--timeout", "0.1"]
    script = tmp_path / "train.py"
    script.write_text(FULL_DISK)
    argv = arguments(olmo2, text, tmp_path / "out", *more)
    (_, err), (_, silent) = (
        process.communicate(timeout=60)
        for process in start_ranks(quick, 2, ROOT, rank, *argv, script=script)
    )
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "What was saved before is intact" in line and "too large" in line
    assert "Traceback" not in err + silent
    assert not files.newest_checkpoint(tmp_path / "out")


UNEVEN = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from torch.distributed.fsdp import fully_shard
from variants import distributed, files

distributed.join("cpu", 1)
out = Path(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
if distributed.WORLD > 1:
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
scaler = torch.amp.GradScaler("cpu", enabled=False)
if not out.exists():
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    files.save_checkpoint(out, 1, model, optimizer, scaler, {})
else:
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    files.check_checkpoint(out, {})
    files.load_checkpoint(out, model, optimizer, scaler)
values = files.state_of(model, optimizer)
print(*(f"{distributed.full(values[name]).sum().item():.6f}" for name in sorted(values)))
"""


@pytest.mark.slow
def test_ranks_without_a_row_save_and_load(tmp_path, quick):
    """Three rows on four ranks: the last has none."""
    script = tmp_path / "train.py"
    script.write_text(UNEVEN)
    found = []
    for count in (4, 1, 2, 4):
        ranks = start_ranks(quick, count, ROOT, tmp_path / "out", script=script)
        outs = [finished(process)[0].splitlines()[-1] for process in ranks]
        assert len(set(outs)) == 1
        found.append(outs[0])
    assert len(set(found)) == 1


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(olmo2, text, tmp_path, quick):
    """Killed between the name of the model and the removal of the checkpoint."""
    more = [*RUN, "--save-every", "5"]
    train.main(arguments(olmo2, text, tmp_path / "out", *more))
    (tmp_path / "out/checkpoint/step-5").mkdir(parents=True)
    (tmp_path / "out/checkpoint/step-5/checkpoint.json").write_text("{}")
    ranks = start_ranks(quick, 2, *arguments(olmo2, text, tmp_path / "out", *more, "--resume"))
    (out, _), _ = (finished(process) for process in ranks)
    assert "finished before: " in out and not (tmp_path / "out/checkpoint").exists()


@pytest.mark.slow
def test_ctrl_c_is_one_line_beside_those_of_torchrun(olmo2, text, tmp_path):
    more = [*RUN, "--steps", "100000", "--save-every", "5"]
    process = torchrun(2, *arguments(olmo2, text, tmp_path / "out", *more))
    while not files.newest_checkpoint(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # which torchrun hands on
    _, err = finished(process, code=1)
    assert err.count("train.py: interrupted") == 1
    assert err.count("Traceback") == 1 and "SignalException" in err  # torchrun's own
