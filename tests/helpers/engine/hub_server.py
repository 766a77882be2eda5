"""A Hugging Face hub on this machine: one repository, over HTTP, as huggingface_hub asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    files: Mapping[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        api, files = f"/api/models/{REPO}", f"/{REPO}/resolve/"
        if path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self._etag(data)}
                for name, data in self.files.items()
            ]
            self._send(json.dumps(tree).encode(), with_body)
        elif path in (api, f"{api}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(info).encode(), with_body)
        elif path.startswith(files) and path.removeprefix(files).partition("/")[2] in self.files:
            data = self.files[path.removeprefix(files).partition("/")[2]]
            self._send(data, with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, data: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{self._etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    @staticmethod
    def _etag(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """(endpoint, paths that have been asked for) of a hub with these files in REPO."""
    handler = type("Hub", (Handler,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
