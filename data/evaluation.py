"""The files of evaluate.py and chat_eval.py: evaluation sets, and what is kept beside --out."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import platform
import random
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from data.identity import sha256_of
from data.rows import LANGUAGES, parse, to_lines, write_atomically
from variants import distributed
from variants.distributed import RANK

ROOT = Path(__file__).resolve().parent.parent
NAME = Path(sys.argv[0]).name
SCRIPT = NAME if NAME == "chat_eval.py" else "evaluate.py"
CHOICES = {"answer": list("ABCD"), "correct_answer_num": list("1234")}
IDS = ("id", "sample_id", "link", "question_number", "correct_answer_num")  # may be numbers


def fail(message):
    """Print an error that the user can fix, in one line, and exit with code 2."""
    distributed.fail(message, SCRIPT)


def code_sha256(lang, *scripts):
    """Return the sha256 of scripts, of what writes their prompts, and of the words for these."""
    shared = ["data/evaluation.py", "data/instruct.py", "data/models.py"]
    code = sha256_of([ROOT / name for name in (*shared, *scripts)])
    words = json.dumps([LANGUAGES["en"], LANGUAGES[lang]])
    return hashlib.sha256(f"{code} {words}".encode()).hexdigest()


def versions_for(device):
    """Return all versions that results may depend on, on a CPU also its kind and threads."""
    versions = {name: version(name) for name in ("torch", "transformers", "sacrebleu")}
    versions |= dict(python=platform.python_version())
    if device == "cpu":
        versions |= dict(threads=str(torch.get_num_threads()))
        versions |= dict(cpu=torch.backends.cpu.get_cpu_capability())
    return versions


# ---- Evaluation sets -----------------------------------------------------------------------------


def read_rows(args, side, name, columns, optional=False):
    """Return the rows of a JSON Lines file of --data-dir, and remember the file in args.files.

    Every row has text in `columns`, or a chat in `messages` that ends with an answer.
    """
    path = Path(args.data_dir, "en" if side == "source" else args.lang, f"{name}.jsonl")
    if optional and not path.exists():
        return []
    args.files.append(path)
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
            json.dumps(row, ensure_ascii=False).encode()  # fails at half of a surrogate pair
            turns = row.get("messages") or []
            texts = [turn["content"].strip() for turn in turns]
            if not turns:
                numbers = [name for name in columns if type(row[name]) in (int, float)]
                row |= {name: str(row[name]) for name in numbers if name not in IDS}
                texts = [row[name] for name in columns]
            if not all(type(text) in (str, int, float) and str(text).strip() for text in texts):
                raise ValueError("a text is empty")
            for name in CHOICES.keys() & set(columns):
                if str(row[name]) not in CHOICES[name]:
                    raise ValueError(f"{name} is none of {', '.join(CHOICES[name])}")
            if turns and [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
                raise ValueError("messages do not end with a user's turn and an assistant's")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            wanted = f"one JSON object in UTF-8 with {', '.join(columns)}"
            fail(f"{path}: line {number} is not {wanted} ({error}). Repair or remove it")
        rows.append(row)
    return rows or fail(f"{path} is empty. Write one JSON object per line")


def sample(rows, args, size=None):
    """Return `size` random rows, --num-samples by default, in their order."""
    size = min(size or args.num_samples, len(rows))
    chosen = random.Random(args.seed).sample(range(len(rows)), size)
    return [rows[i] for i in sorted(chosen)]


def sides(args):
    """Return the sides with their entries of data/languages.json, English prompts by default."""
    english, target = LANGUAGES["en"], LANGUAGES[args.lang]
    prompts = english["prompts"] | target.get("prompts", {})
    return ("source", english), ("target", target | {"prompts": prompts})


def in_words(language, row, options, context=""):
    """Return the text of a question with options A to D, in the words of Table 7."""
    options = dict(zip("abcd", [row[option] for option in options], strict=True))
    template = language["prompts"]["question"]
    return template.format(context=context, question=row["question"], **options)


# ---- Results -------------------------------------------------------------------------------------


def json_file(name):
    """Return the path that --out names. Its suffix is replaced in the names of other files."""
    path = Path(name)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"{name} does not end in .json. Choose a name that does")
    return path


def check_out(path, form):
    """Refuse to overwrite a file that is not of an earlier run."""
    if path.exists() and f'"format": "{form}"' not in path.read_text(errors="replace")[:100]:
        fail(f"{path} exists, and no earlier run wrote it. Choose another --out")


@contextlib.contextmanager
def locked(out):
    """Create the directory of --out, and keep other processes from writing there."""
    if RANK > 0:  # rank 0 alone writes
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process writes {out}. Wait for it, or choose another --out")
        yield


def key_of(saved):
    """Return what tells an item from all others."""
    return saved["task"], saved["side"], saved["run"], saved["id"]


def resume(path, header, key=key_of):
    """Return {key: record} of an interrupted run with the same header, or else nothing.

    The file then has the header and these.
    """
    if RANK > 0:
        return {}
    done = read_items(path, header, key) if path.exists() else {}
    write_atomically(path, to_lines([header, *done.values()]))
    return done


def read_items(path, header, key):
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        first, *found = map(json.loads, lines)
        if first == header:
            return {key(saved): saved for saved in found}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged ({error}). Delete it, or the line, to have that done again")
    print(f"{path} is of other settings, data, model, machine or versions: starting again")
    path.replace(f"{path}.old")
    return {}


def append(path, records):
    """Add finished items to the items file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_lines(records))
