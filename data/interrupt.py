"""Ctrl-C while a stage still imports torch, which takes seconds: one line and exit code 130.

A stage imports this first. When its main() is defined, Ctrl-C raises KeyboardInterrupt as usual,
but ends the processes that tokenize without a word.
"""

import os
import signal
import sys
from pathlib import Path

SCRIPT = Path(sys.argv[0]).name
PROCESS = os.getpid()


def end(number, frame):
    if os.getpid() != PROCESS:
        os._exit(130)
    if hasattr(sys.modules["__main__"], "main"):
        raise KeyboardInterrupt
    os.write(2, f"{SCRIPT}: interrupted\n".encode())
    os._exit(130)


if SCRIPT in ("score.py", "make_mask.py", "train.py", "evaluate.py"):
    signal.signal(signal.SIGINT, end)
