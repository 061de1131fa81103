"""A `python` for tests of run_all.sh that has torch and transformers imported already.

Each stage of run_all.sh is a process of its own, whose imports take 4 to 8 seconds. The `python`
made here sends its arguments, folder, environment and standard files to a server, a fork of the
tests' process. The server forks once more, and that fork runs the script as `python` would, in the
process group of the caller, so that signals reach it. `python -c` and `python -m` are real ones.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = """#!{python} -SE
import json, os, socket, sys
argv = sys.argv[1:]
if argv[0].startswith("-"):
    os.execv({python!r}, [{python!r}, *argv])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([argv, os.getcwd(), dict(os.environ), os.getpgrp()])
socket.send_fds(server, [b"files"], [0, 1, 2])
server.sendall(request.encode())
server.shutdown(socket.SHUT_WR)
os._exit(int(server.recv(9) or 1))
"""


def start(folder):
    """Write folder/python and start its server. Return the process id, for `stop`."""
    address = str(folder / "socket")
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        listener.close()
        return pid
    try:
        serve(listener, parent)
    finally:
        os._exit(1)


def stop(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def serve(listener, parent):
    """Fork for each client until the tests' process has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.settimeout(1)
    while os.getppid() == parent:
        try:
            client, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            client.settimeout(None)
            run(client)
        client.close()


def is_ours(module):
    """Also variants, which has no file, and would keep the modules that it had."""
    place = getattr(module, "__file__", None) or list(getattr(module, "__path__", []))
    return f"{ROOT}/" in str(place) and ".venv" not in str(place)


def run(client):
    """Run the script of a client, send its exit code and exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(client, 5, 3)
    request = b"".join(iter(lambda: client.recv(65536), b""))
    argv, folder, environment, group = json.loads(request)
    os.setpgid(0, group)
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name, m in sys.modules.items() if is_ours(m)]:
        del sys.modules[name]  # the script imports them under its own environment
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    code = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        client.sendall(str(code).encode())
        os._exit(code)
