"""The files around the loop of train.py: what it reads, and what it keeps in OUT.

OUT/model is an ordinary Hugging Face directory. OUT/checkpoint/step-N is what --resume needs; it
gets its name when it is complete. torch.distributed.checkpoint writes the trained weights and
Adam's state as safetensors. Step, settings, scaler and a digest of each file stand beside them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
import xxhash
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from tqdm import tqdm
from transformers.utils import cached_file, is_flash_attn_2_available

from data import models
from data.identity import digest_of, fingerprint, sha256_of, shapes_of
from data.rows import write_atomically
from variants.distributed import (
    LOCAL_RANK,
    RANK,
    WORLD,
    add_up,
    barrier,
    check_alike,
    fail,
    from_rank_zero,
    full,
    gather,
    local,
    mine,
    one_error,
    read_buffers,
)

CHECKPOINT_FILE = 2**28  # bytes of a rank's state in one file, which is built in main memory
OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def peak_memory(device):
    """Return the peak bytes of PyTorch's allocator on a GPU, of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --------------------------------------------------------------------------------------------------
# Model and masks


def load_skeleton(name):
    """Return (the model without weights, its tokenizer, the directory of its files)."""
    model, tokenizer = models.load_skeleton(name, fail)
    directory = Path(cached_file(name, "config.json")).parent
    absent = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    cached_file(name, "generation_config.json", **dict.fromkeys(absent, False))  # to be copied
    return model, tokenizer, directory


def commit_of(name, directory):
    """Return the commit of a hub id, after which the directory of its files is named, or None."""
    return None if Path(name).is_dir() else directory.name


def load_model(name, directory, **options):
    """Return the model, of the same commit as before. Fail if its files lack a tensor."""
    commit = commit_of(name, directory) or "main"
    return models.load_weights(name, fail, revision=commit, **options)


def fastest_attention(args, model):
    """Return the name of an attention kernel, or None for the model's default, mostly SDPA."""
    if args.precision == "fp32":  # flash-attn takes none, and on a CPU SDPA is as fast
        return None
    if args.device == "cpu":  # SDPA's backward pass takes longer where sequences are short
        return "eager" if args.seq_len <= 128 else None
    flash = model._supports_flash_attn and is_flash_attn_2_available()
    return "flash_attention_2" if flash else None


def kept(path):
    """Return whether a path is a file of a model. The model card and other formats are not."""
    return path.is_file() and path.suffix not in OTHER_FORMATS and path.name != "README.md"


def model_key(name, directory):
    """Identify a model's files: the commit of a hub id, the sha256 of a directory's files.

    For all ranks. One on each machine reads the files.
    """
    if commit := commit_of(name, directory):
        return commit
    digest = None
    if LOCAL_RANK == 0:
        digest = sha256_of([path for path in directory.iterdir() if kept(path)])
    first = from_rank_zero(digest)
    if digest not in (None, first):
        fail(f"--model {directory}: not the files that rank 0 has. Copy them to all machines")
    return first


def is_exact(source, dtype):
    """Return whether {name: weights} can be stored in dtype without rounding. For all ranks."""
    rounded = torch.zeros(1, device=next(iter(source.values())).device)
    for weight in source.values():
        rows = local(weight)
        rounded += (rows != rows.to(dtype).float()).any()
    return add_up(rounded).item() == 0


def saved_buffers(model, directory):
    """Return {name: tensor} of what a model holds beside weights, read from its files if empty."""
    buffers = dict(model.named_buffers())
    found = {name: buffers[name] for name in model.state_dict() if name in buffers}
    if any(buffer.is_meta for buffer in found.values()):  # several ranks: the skeleton
        return read_buffers(model, directory)
    return found


@torch.no_grad()
def save_model(model, source, dtype, directory, out):
    """Write {name: weights} in `dtype`, and the source's other files as they are. For all ranks.

    Both model and source give up a weight as soon as it is rounded: main memory may not hold all of
    them twice.
    """
    state = {}
    for name in list(source):
        whole = full(source.pop(name))
        if RANK == 0:
            state[name] = whole.to(dtype).cpu()
        if WORLD == 1:
            model.get_parameter(name).data = state[name]
    if RANK > 0:
        return
    for name, buffer in saved_buffers(model, directory).items():
        rounded = buffer.to(dtype) if buffer.is_floating_point() else buffer
        state[name] = rounded if torch.equal(rounded.to(buffer.dtype), buffer) else buffer
    shutil.rmtree(out, ignore_errors=True)
    model.generation_config = transformers.GenerationConfig()  # the source's is copied below
    model.to(dtype).save_pretrained(out, state_dict=state)
    (out / "generation_config.json").unlink(missing_ok=True)
    for file in directory.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if kept(file) and not weights:
            shutil.copyfile(file, out / file.name)
    for file in out.iterdir():
        shutil.copymode(out / "config.json", file)  # safetensors lets nobody else read its files
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def maskable(model):
    """Return the names of all parameters but embeddings and LM head, which SSU always trains."""
    return dict(model.named_parameters()).keys() - models.embeddings_and_head(model)


def load_masks(path, model):
    """Return {parameter name: uint8 mask}. Exit with an error if they do not fit this model."""
    if path.is_dir():
        fail(f"--mask {path}: is a directory. Name the file in it")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            masks = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        fail(f"--mask {path}: cannot be read ({error}). Make it again with make_mask.py")
    if (about.get("format"), about.get("version")) != ("ssu-mask", "1"):
        fail(f"--mask {path}: not a mask file of version 1. Make it with make_mask.py")
    if about.get("tensors_sha256") != digest_of(masks):
        fail(f"--mask {path}: damaged, its digest does not match. Make it again with make_mask.py")
    if about.get("fingerprint") != fingerprint(shapes_of(model)):
        other = f"--mask {path} was made for {about.get('model')}, whose parameters differ"
        fail(f"{other}. Make one for --model")
    if missing := sorted(maskable(model) - masks.keys()):
        fail(f"--mask {path}: no mask for {missing[:3]}. Make it again with make_mask.py")
    params = dict(model.named_parameters())
    for name, mask in masks.items():
        fits = name in params and mask.dim() == params[name].dim() and mask.dtype == torch.uint8
        sizes = zip(mask.shape, params[name].shape, strict=True) if fits else ()
        if not fits or mask.max() > 1 or any(m not in (1, n) for m, n in sizes):
            fail(f"--mask {path}: {name} {list(mask.shape)} does not fit. Make it again")
    return masks


def check_fit(args, model, masks):
    """Exit with an error if the model or the masks do not allow what the arguments ask for."""
    if args.out.resolve() == Path(args.model).resolve():
        fail(f"--out {args.out}: is the folder of the source model. Choose another")
    matrices = [masks[name] for name in maskable(model) & masks.keys()]
    if args.compact and any(mask.dim() == 2 and len(mask) > 1 for mask in matrices):
        fail(f"--compact: {args.mask} freezes rows or elements, not columns. Leave --compact out")
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        fail(f"--gradient-checkpointing: {type(model).__name__} has none. Leave it out")
    context = models.context_of(model.config)
    if context < args.seq_len:
        fail(f"--seq-len {args.seq_len}: {args.model} takes at most {context} tokens. Lower it")


def print_plan(args, model, masks, num_sequences, first):
    """Say what will be done. num_sequences: of the text; first: the first one that is read."""
    total = sum(p.numel() for p in model.parameters())
    num_drawn = args.steps * args.batch_size
    frozen = 0.0  # weights
    for name, mask in masks.items():
        frozen += (mask == 0).float().mean().item() * model.get_parameter(name).numel()
    print(f"{args.model}: {total:,} parameters, {frozen / total:.1%} of them frozen by the masks")
    print(f"{args.precision} on {args.device} x {WORLD}, {args.optimizer}, seed {args.seed}")
    print(f"first sequence: {first!r}")
    print(
        f"{args.steps:,} steps x {args.batch_size} sequences x {args.seq_len} tokens = "
        f"{num_drawn * args.seq_len:,} tokens, {num_drawn / num_sequences:.2f} epochs"
    )


# --------------------------------------------------------------------------------------------------
# OUT: lock and log


@contextlib.contextmanager
def locked(out, resume):
    """Create OUT and keep other runs from writing to it."""
    if RANK > 0:
        check_out(out, resume)
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another train.py writes to it. Wait, or choose another directory")
    try:
        check_out(out, resume)  # again: another run may have ended since
        yield
    finally:
        os.close(lock)


def check_out(out, resume):
    """Exit with an error if OUT holds what this run would overwrite, or lacks what it resumes.

    For all ranks. What rank 0 sees counts.
    """
    final, folder, checkpoint, foreign = from_rank_zero(contents_of(out) if RANK == 0 else None)
    if final and folder and resume:  # killed while it removed the checkpoint
        if RANK == 0:
            remove_checkpoints(out)
        print(f"finished before: {out}/model")
        raise SystemExit(0)
    if final:
        fail(f"--out {out}: holds a finished model. Choose another directory, or delete it")
    if checkpoint and not resume:
        fail(f"--out {out}: holds a checkpoint. Add --resume, or delete it to start again")
    if resume and not checkpoint:
        fail(f"--resume: {out}/checkpoint holds no checkpoint. Leave --resume out to start")
    if foreign and not checkpoint:  # a damaged log beside a sound checkpoint is no obstacle
        fail(f"--out {out}: holds files that train.py did not write. Choose another directory")


def contents_of(out):
    """Return what OUT has: (a model, a folder of checkpoints, the newest one, a foreign file)."""
    log, foreign = out / "train.jsonl", (out / "model.tmp").exists()
    if log.exists():
        foreign = not log.open(errors="replace").readline().startswith('{"settings"')
    final, folder = ((out / name).exists() for name in ("model", "checkpoint"))
    return final, folder, newest_checkpoint(out), foreign


def finish(out):
    """Give the complete model its name, then remove the checkpoint that is no longer needed."""
    if RANK == 0:
        os.replace(out / "model.tmp", out / "model")
        remove_checkpoints(out)


def start_log(path, header, start):
    """Begin train.jsonl anew, or keep its readable lines up to step `start`."""
    if RANK > 0:
        return
    lines = [json.dumps(header, default=str)]
    old = []
    if start and path.exists():
        old = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    for line in old:
        try:
            if json.loads(line)["step"] <= start:
                lines.append(line)
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off, or the count
            continue
    write_atomically(path, "\n".join(lines) + "\n")


def append_line(path, values):
    if RANK > 0:
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


# --------------------------------------------------------------------------------------------------
# OUT: checkpoints


def state_of(model, optimizer):
    """Return the trained weights, Adam's moments and steps by name, to save or to load in place."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[f"weight/{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{key}/{name}"] = value
    return state


def resume_settings(args, model_key, data_key, masks):
    """Return what must be the same on --resume. On a CPU the result is then bit-identical.

    For all ranks. Exit with an error if they differ in it, or in when they evaluate and save.
    """
    # Of model, data and mask the contents count.
    paths = {"model", "data", "mask", "out", "source_eval", "target_eval"}
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    settings |= {"model": model_key, "data": data_key, "mask": digest_of(masks)}
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    check_alike(settings)
    for name in ("eval_every", "eval_tokens", "log_every", "save_every", "resume", "timeout"):
        del settings[name]
    if args.device == "cpu":
        settings["threads"] = torch.get_num_threads()
        settings["cpu"] = torch.backends.cpu.get_cpu_capability()
    return settings


def save_checkpoint(out, step, model, optimizer, scaler, settings):
    """Write the checkpoint of a step and remove older ones. Exit with an error if not finite."""
    began = time.perf_counter()
    state = state_of(model, optimizer)
    bad = sum((~local(value).isfinite()).any() for value in state.values())
    if add_up(bad) > 0:
        fail(f"step {step}: weights are not finite. Lower --lr; what was saved before is intact")
    final = out / f"checkpoint/step-{step}"
    temporary = final.with_suffix(".tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    if not temporary.is_dir():
        fail(f"--out {out}: not on a file system that all machines share. Choose one")
    file_of, size = {}, 0
    for name, value in state.items():
        file_of[name] = 1 + size // (CHECKPOINT_FILE * WORLD)
        size += value.nbytes  # of all ranks
    writer = HuggingFaceStorageWriter(str(temporary), file_of, save_distributed=True)
    with one_error():
        dcp.save(state, storage_writer=writer, no_dist=WORLD == 1)
    digests = tensor_digests(temporary)
    if RANK == 0:
        about = {"step": step, "settings": settings, "scaler": scaler.state_dict()}
        about["files"] = digests
        write_atomically(temporary / "checkpoint.json", json.dumps(about))
        os.replace(temporary, final)
        remove_checkpoints(out, keep=final)
    barrier()
    tqdm.write(f"step {step}: checkpoint saved in {time.perf_counter() - began:.1f} s")


def load_checkpoint(out, model, optimizer, scaler):
    """Fill weights and moments in place. Return the number of finished steps."""
    path = newest_checkpoint(out)
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    for name, p in model.named_parameters():
        if f"exp_avg/{name}" in saved:  # not if the parameter never got a gradient
            zeros = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            moments = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments
    with one_error():
        dcp.load(state_of(model, optimizer), storage_reader=reader, no_dist=WORLD == 1)
    about = json.loads((path / "checkpoint.json").read_text())
    scaler.load_state_dict(about["scaler"])
    print(f"resumed after step {about['step']}")
    return about["step"]


def check_checkpoint(out, settings):
    """Exit with an error if the checkpoint is damaged or of a run with other settings."""
    path = newest_checkpoint(out)
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        saved, digests = about["settings"], about["files"]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"--resume: {path} is damaged ({error}). Delete it to start again")
    if digests != tensor_digests(path):
        fail(f"--resume: {path} is damaged, its tensors have changed. Delete it to start again")
    for key in saved | settings:
        if saved.get(key) != settings.get(key):
            change = f"{key} was {saved.get(key)}, is {settings.get(key)}"
            fail(f"--resume: {path} is of another run: {change}. Run as before, or delete it")


def tensor_digests(folder):
    """Return a fast digest of each tensor file, to find damage. The ranks share the work."""
    found = {}
    names = from_rank_zero(sorted(path.name for path in folder.glob("*.safetensors")))
    for name in mine(names):
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    digests = {}
    for some in gather(found):
        digests |= some
    return from_rank_zero(digests)


def newest_checkpoint(out):
    """Return the newest complete checkpoint, or None."""
    found = []
    for path in out.glob("checkpoint/*/checkpoint.json"):
        if re.fullmatch(r"step-\d+", path.parent.name):
            found.append(path.parent)
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def remove_checkpoints(out, keep=None):
    """Remove all checkpoints but one, and the folder if nothing else is in it, such as a copy."""
    folder = out / "checkpoint"
    for path in folder.glob("step-*"):
        if path != keep and re.fullmatch(r"step-\d+(\.tmp)?", path.name):
            shutil.rmtree(path)
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
