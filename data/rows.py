"""What users write: files of text, JSON Lines above all, and languages.json."""

import argparse
import gzip
import json
import os
import sys
from pathlib import Path
from string import Formatter

COLUMNS = ("text", "messages", "instruction", "input", "output")


def read_rows(path):
    """Yield the rows of a .parquet, .jsonl, .jsonl.gz or .txt file. Blank lines are left out."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile  # tools/plan.py needs this file before a set-up

        file = ParquetFile(path)
        needed = [name for name in file.schema_arrow.names if name in COLUMNS]
        for batch in file.iter_batches(1000, columns=needed or None):
            yield from batch.to_pylist()
        return
    opened = gzip.open(path) if path.endswith(".gz") else open(path, "rb")
    with opened as lines:
        for line in lines:
            if not line.strip():
                continue
            if b"\0" in line:
                raise ValueError(guess(line))
            if path.removesuffix(".gz").endswith(".txt"):
                yield {"text": line.decode("utf-8-sig").strip()}
            else:
                yield parse(line)


def parse(line):
    """Return the row of a line of bytes. Raise ValueError that says what the line seems to be."""
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(guess(line) or error) from None
    if not isinstance(row, dict):
        raise ValueError(guess(line) or f"{text.strip()[:40]} is no object")
    return row


def guess(line):
    """Return what a line that is no row seems to be, and what to do, or an empty string."""
    start = line.removeprefix(b"\xef\xbb\xbf").strip()
    if line.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):  # gzip, Zstandard
        return "it is compressed: unpack it, or let the name of a gzip file end in .gz"
    if b"\0" in line:
        return "it is in UTF-16 or UTF-32: convert the file to UTF-8"
    if start[:1] == b"[":
        return "it begins a JSON array: write each of its objects on a line of its own"
    if start == b"{":
        return "it begins an object of several lines: write each object on one line"
    if b"\t" in start and start[:1] != b"{":
        return "it is a line of tab-separated values: write them as JSON objects"
    return ""


def to_lines(rows):
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_atomically(path, text):
    """Write a text file under a temporary name and rename it, so that it is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_languages():
    """Return languages.json. If it cannot be read, exit with an error: its users edit it."""
    path = Path(__file__).with_name("languages.json")
    try:
        languages = json.loads(path.read_text(encoding="utf-8"))
        for code, about in languages.items():
            if "name" not in about:
                raise ValueError(f"{code} has no name")
            check_prompts(code, about.get("prompts", {}), languages["en"]["prompts"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        script = Path(sys.argv[0]).name
        print(f"{script}: error: {path} cannot be read: {error}. Correct it", file=sys.stderr)
        raise SystemExit(2) from None
    return languages


def check_prompts(code, prompts, english):
    """Raise ValueError if a prompt has another name or other fields than those of English."""
    for name, prompt in prompts.items():
        if name not in english:
            raise ValueError(
                f"{code} has a prompt {name}, which is not one of {', '.join(english)}"
            )
        needed, given = fields_of(english[name]), fields_of(prompt)
        if not needed - {"X"} <= given <= needed:  # X: a prompt may write the language's name
            given, needed = (" ".join(sorted(some)) or "none" for some in (given, needed - {"X"}))
            raise ValueError(f"the prompt {name} of {code} has fields {given}, but needs {needed}")
        prompt.format(**dict.fromkeys(given, ""))  # raises ValueError for a field such as {X: }


def fields_of(prompt):
    """Return the names in braces."""
    return {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}


def language_code(code):
    """Return the code of a target language, or raise what argparse prints."""
    codes = sorted(LANGUAGES.keys() - {"en"})
    if code not in codes:
        what = f"{code!r} is not one of {' '.join(codes)}. Add it to data/languages.json"
        raise argparse.ArgumentTypeError(what)
    return code


def paper_language_code(code):
    """Return the code of a language whose sets of the paper have names in languages.json."""
    missing = LANGUAGES["en"].keys() - LANGUAGES[language_code(code)].keys() - {"prompts"}
    if missing:
        what = f"data/languages.json has no {' '.join(sorted(missing))} for {code}"
        raise argparse.ArgumentTypeError(f"{what}. Add them, or use text of your own (README.md)")
    return code


LANGUAGES = read_languages()
