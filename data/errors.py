"""How a script ends where its user can mend what is wrong."""

import sys


def fail(script, message):
    """Print an error in one line, and exit with code 2."""
    line = " ".join(str(message).split())[:500]
    print(f"{script}: error: {line}", file=sys.stderr)
    raise SystemExit(2)
