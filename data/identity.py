"""What identifies files, tensors and this code in all that the stages write and compare."""

import hashlib
import subprocess
from pathlib import Path


def sha256_of(paths):
    """Return the sha256 over names and contents of files, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def digest_of(tensors):
    """Return the sha256 over names and bytes of {name: tensor}, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def git_commit():
    """Return the commit of this code, with -dirty if files changed since, or None."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    options = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True}
    try:
        return subprocess.run(command, **options).stdout.strip() or None
    except OSError:  # no git on this machine
        return None
