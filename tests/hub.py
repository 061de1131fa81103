"""A stand-in for the Hugging Face hub on loopback, for tests of the real clients out of its reach.

It serves HUB/datasets/OWNER/NAME/... and HUB/models/OWNER/NAME/..., HUB being a folder that goes
with the process, through the parts of the hub's HTTP interface that huggingface_hub uses to list
and fetch files. Every repository has one commit, the one asked for; branches are at COMMIT. One
with a file named .gated wants the token "let-me-in".
"""

import atexit
import json
import re
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

HUB = Path(tempfile.mkdtemp(prefix="hub-"))
atexit.register(shutil.rmtree, HUB, ignore_errors=True)
REQUESTS = []  # (command, path, range) of each, so far
COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(
    r"/api/(datasets|models)/([^/]+/[^/]+)"
    r"(?:/(revision|tree|paths-info|auth-check)(?:/([^/]+)(?:/(.*))?)?)?"
)
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=(), length=None):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def entry(self, folder, path):
        path = folder / path
        kind = (
            {"type": "file", "size": path.stat().st_size}
            if path.is_file()
            else {"type": "directory", "size": 0}
        )
        return {**kind, "path": path.relative_to(folder).as_posix(), "oid": path.name}

    def do_GET(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        REQUESTS.append((self.command, url.path, self.headers.get("Range")))
        api, resolve = API.fullmatch(url.path), RESOLVE.fullmatch(url.path)
        if not api and not resolve:
            return self.refuse(404, "RepoNotFound")
        kind, repo = (
            (api[1], api[2]) if api else ("datasets" if resolve[1] else "models", resolve[2])
        )
        folder = HUB / kind / repo
        if not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        # on the hub, too, who may not read the files of a gated repository may still list them
        private = (folder / ".gated").exists() and (resolve or api[3] == "auth-check")
        if private and self.headers.get("Authorization") != "Bearer let-me-in":
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        revision = (api[4] if api else resolve[3]) or "main"
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else COMMIT
        files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        if resolve:
            return self.send_file(folder / unquote(resolve[4]), commit)
        if api[3] == "auth-check":
            return self.answer(200, {})
        if api[3] == "tree":
            below = folder / unquote(api[5] or "")
            if not below.exists():
                return self.refuse(404, "EntryNotFound")
            found = (
                below.rglob("*")
                if "true" in parse_qs(url.query.lower()).get("recursive", [])
                else below.iterdir()
            )
            return self.answer(200, [self.entry(folder, f) for f in sorted(found)])
        if api[3] == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.answer(200, [self.entry(folder, f) for f in paths if (folder / f).exists()])
        return self.answer(
            200,
            {
                "_id": "0",
                "id": repo,
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2025-01-01T00:00:00.000Z",
                "author": repo.split("/")[0],
                "createdAt": "2025-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": f} for f in files],
            },
        )

    do_HEAD = do_POST = do_GET

    def send_file(self, path, commit):
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        size = path.stat().st_size
        headers = {
            "ETag": f'"{size}-{path.name}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        first, last, status = 0, size - 1, 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last, status = int(span[1]), min(int(span[2] or size - 1), size - 1), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        length = last - first + 1
        if self.command == "HEAD":  # a test may serve a large file that has holes
            return self.answer(status, b"", headers, length)
        with open(path, "rb") as file:
            file.seek(first)
            return self.answer(status, file.read(length), headers)


def serve():
    """Serve HUB in a thread until the process ends. Return its address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
