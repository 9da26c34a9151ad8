"""A small hub on this machine: the few calls of the Hugging Face hub that a dataset is read with."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_only_for_tests"


@dataclass
class Hub:
    """Datasets by name: {revision: {path: bytes}}, cards, and what was asked."""

    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    """(path, range, authorization) of each request."""
    url: str = ""

    def commit(self, revision: str) -> str:
        """The commit that a branch is at; a commit is its own."""
        return revision if re.fullmatch("[0-9a-f]{40}", revision) else revision.encode().hex().ljust(40, "0")[:40]

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or commit."""
        by_commit = {self.commit(branch): files for branch, files in self.datasets[name].items()}
        return by_commit.get(self.commit(revision))

    def bytes_read(self) -> int:
        """How much of files was asked for."""
        spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", span or "") for path, span, _ in self.asked if "/resolve/" in path]
        return sum(int(span[2]) - int(span[1]) + 1 for span in spans if span)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, listening on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((path, self.headers.get("range"), self.headers.get("authorization")))
            match = re.fullmatch(r"(/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/(.+))?", path)
            name = match[2] if match else ""
            hidden = name in hub.private and self.headers.get("authorization") != f"Bearer {TOKEN}"
            if match is None or name not in hub.datasets or hidden:
                return self.fail(401, "RepoNotFound")
            revision, _, inner = self.split(name, match[4] or "main")
            files = hub.files(name, revision)
            if files is None:
                return self.fail(404, "RevisionNotFound")
            if match[3] == "tree":
                return self.send(json.dumps(self.tree(files, inner)).encode())
            if match[3] == "resolve":
                return self.send(files[inner]) if inner in files else self.fail(404, "EntryNotFound")
            siblings = [{"rfilename": file} for file in files]
            card = hub.cards.get(name, {})
            about = {"id": name, "sha": hub.commit(revision), "siblings": siblings, "cardData": card}
            return self.send(json.dumps(about).encode())

        def split(self, name: str, rest: str) -> tuple[str, str, str]:
            """Revision and path: a revision may have slashes."""
            for revision in hub.datasets[name]:
                if rest == revision or rest.startswith(f"{revision}/"):
                    return revision, "/", rest[len(revision) + 1 :]
            return rest.partition("/")

        def tree(self, files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
            below = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
            folders = {path.rpartition("/")[0] for path in below} - {"", folder}
            return [
                *({"type": "directory", "path": path, "size": 0, "oid": "0"} for path in sorted(folders)),
                *({"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in below.items()),
            ]

        def send(self, body: bytes, status: int = 200) -> None:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
            piece = body[int(span[1]) : int(span[2]) + 1] if span else body
            self.send_response(206 if span else status)
            self.send_header("content-length", str(len(piece)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(piece)

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("x-error-code", code)
            self.send_header("content-length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
