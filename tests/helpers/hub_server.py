"""The interface of the Hugging Face Hub on loopback: repositories of files, in this process."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_NOT_FOUND = {"X-Error-Code": "RepoNotFound"}


class Hub:
    """Repositories, and what was asked for.

    Attributes:
      repositories: OWNER/NAME -> file -> bytes.
      gated: names of repositories that need the token "secret".
      break_after: bytes of a file after which the connection is dropped, once; or None.
      stalls: instead of being dropped, the connection says nothing more.
      ends_early: what follows a part of a file is empty.
      asked: (method, path, Range or None) of every request.
      url: of the server.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.break_after: int | None = None
        self.stalls = False
        self.ends_early = False
        self.over = threading.Event()
        self.status: int | None = None
        self.asked: list[tuple[str, str, str | None]] = []
        self.url = ""


@contextlib.contextmanager
def served():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Range")))
            if hub.status is not None:
                return self.answer(hub.status, b"")
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                name, revision = found[1], found[2] or "main"
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                name, revision = found[1], found[2]
            else:
                return self.answer(404, b"")
            if name not in hub.repositories:
                return self.answer(401, b"{}", _NOT_FOUND)
            if name in hub.gated and self.headers.get("Authorization") != "Bearer secret":
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = hub.repositories[name]
            if path.startswith("/api/"):
                siblings = [{"rfilename": file} for file in files]
                body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(body).encode())
            if (data := files.get(found[3])) is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            self.send_file(data)

        def send_file(self, data):
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            status, part = 200, data
            if asked := self.headers.get("Range"):
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                status, part = 206, b"" if hub.ends_early else data[start:]
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = hub.break_after
            if self.command == "GET" and cut is not None and len(part) > cut:
                hub.break_after = None
                self.answer(status, part, headers, cut)
                if hub.stalls:
                    self.wfile.flush()
                    hub.over.wait()
                self.close_connection = True
                return
            self.answer(status, part, headers)

        def answer(self, status, body, headers=None, cut=None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
