"""What identifies files, tensors, models and this code, and the format of scores and masks."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def sha256_of(paths):
    """Return the sha256 over names and contents of files, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(os.fsencode(path.name) + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def digest_of(tensors):
    """Return the sha256 over names and bytes of {name: tensor}, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(shapes):
    """Identify an architecture: sha256 over its sorted lines, such as "model.norm.weight 576"."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes_of(model):
    """Return {parameter name: list of its sizes}."""
    return {name: list(p.shape) for name, p in model.named_parameters()}


def format_of(path):
    """Return the "format" entry of a safetensors file's metadata, or None."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None


def save_tensors(path, tensors, metadata):
    """Write a safetensors file, whole or not at all. The same content gives the same bytes."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)
        with open(temporary, "r+b", buffering=0) as file:
            # The library writes the metadata in random order. Sorting it keeps the length.
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
            file.seek(8)
            file.write(text.encode().ljust(size))
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # the library lets nobody else read its files
        os.replace(temporary, path)
    finally:
        if temporary.is_file():
            temporary.unlink()


def git_commit():
    """Return the commit of this code, with -dirty if files changed since, or None."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    options = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True}
    try:
        return subprocess.run(command, **options).stdout.strip() or None
    except OSError:  # no git on this machine
        return None
