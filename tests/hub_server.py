"""A hub on this machine: the few paths of its HTTP interface that a download takes, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".pth")  # kept outside git, as the hub does


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of the body


@dataclass
class Repo:
    folder: Path
    commit: str
    token: str | None = None  # that is asked for
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # other sizes than the files have
    digests: dict[str, str] = field(default_factory=dict)  # other digests

    @property
    def files(self) -> dict[str, Path]:
        return {str(f.relative_to(self.folder)): f for f in sorted(self.folder.rglob("*")) if f.is_file()}

    def sha256(self, name: str) -> str:
        return self.digests.get(name) or hashlib.sha256(self.files[name].read_bytes()).hexdigest()

    def sibling(self, name: str) -> dict[str, Any]:
        size = self.sizes.get(name, self.files[name].stat().st_size)
        found: dict[str, Any] = {"rfilename": name, "size": size}
        if name.endswith(LARGE):
            found["blobId"] = "0" * 40  # of a pointer
            found["lfs"] = {"size": size, "sha256": self.sha256(name), "pointerSize": 134}
        else:
            found["blobId"] = git_id(self.files[name])
        return found


class Hub:
    """What is on it, what was asked of it, and what is to go wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.cut: dict[str, int] = {}  # by file name: the next download of it ends after so many bytes
        self.stall: dict[str, int] = {}  # by file name: the next download of it falls silent after so many bytes
        self.silent = threading.Event()  # one has
        self.closing = threading.Event()
        self.status: int | None = None  # what everything is answered with
        self.whole = False  # ranges are ignored
        self.circling = False  # every large file is sent for to where it was asked for
        self.faults: dict[str, str] = {}  # by file name: what is wrong with each answer that holds a part of it
        self.url = ""

    def add(self, name: str, folder: Path, **options: Any) -> Repo:
        commit = hashlib.sha1(f"{name}{len(self.requests)}".encode()).hexdigest()
        self.repos[name] = Repo(folder, commit, **options)
        return self.repos[name]

    def fetched(self) -> dict[str, int]:
        """Bytes sent by file name, of the large files that were asked for."""
        found: dict[str, int] = {}
        for request in self.requests:
            name = request.path.rpartition("/")[2]
            if request.method == "GET" and request.sent and name.endswith(LARGE):
                found[name] = found.get(name, 0) + request.sent
        return found

    def ranges(self, name: str) -> list[str]:
        """The Range headers that came for a file with a download that goes on: they have no end."""
        return [found for found in self._ranges(name) if found.endswith("-")]

    def parts(self, name: str) -> list[str]:
        """The Range headers of who wanted a part of a file; not those that were sent elsewhere for it."""
        return [found for found in self._ranges(name, "/cdn/") if not found.endswith("-")]

    def _ranges(self, name: str, under: str = "/") -> list[str]:
        mine = [r for r in self.requests if r.path.startswith(under) and r.path.endswith(f"/{name}")]
        return [r.headers["range"] for r in mine if "range" in r.headers]


def git_id(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # one that comes while five wait would be made to wait a second

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up between two requests is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(port: int = 0) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        try:
            self._answer()
        except ConnectionError:  # whoever asked has hung up
            self.close_connection = True

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.request_seen = Request(self.command, path, {key.lower(): value for key, value in self.headers.items()})
        self.hub.requests.append(self.request_seen)
        if self.hub.status is not None:
            self._send(self.hub.status, b"not now")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._list(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._body(self.hub.repos[found[1]].files[found[2]])
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _repo(self, name: str) -> Repo | None:
        """The repo, if whoever asks may see it; else the hub's refusals are sent."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token not in (None, token) and not repo.gated):
            self._send(404 if token else 401, b"{}", X_Error_Code="RepoNotFound")
            return None
        return repo

    def _list(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        if revision not in ("main", repo.commit):
            self._send(404, b"{}", X_Error_Code="RevisionNotFound")
            return
        siblings = [repo.sibling(file) for file in repo.files]
        body = {"id": name, "modelId": name, "sha": repo.commit, "private": False, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), Content_Type="application/json")

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.gated and token != repo.token:  # the listing is public, the files are not
            self._send(403 if token else 401, b"", X_Error_Code="GatedRepo")
        elif file not in repo.files:
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repo.commit)
        elif file.endswith(LARGE) and self.hub.circling:
            self._send(302, b"x" * 2**22, Location=self.path)
        elif file.endswith(LARGE):  # to another host, which has no business with the token
            self._send(
                302,
                b"",
                Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}/{file}",
                X_Repo_Commit=repo.commit,
                X_Linked_Size=str(repo.sibling(file)["size"]),
                X_Linked_ETag=f'"{repo.sha256(file)}"',
            )
        elif "Range" in self.headers:
            self._body(repo.files[file])
        else:
            self._send(
                200, repo.files[file].read_bytes(), ETag=f'"{git_id(repo.files[file])}"', X_Repo_Commit=repo.commit
            )

    def _body(self, file: Path) -> None:
        size = file.stat().st_size
        start, stop, ranged = self._range(size)
        fault = self.hub.faults.get(file.name, "") if ranged else ""
        if fault:
            self._faulty(file, start, stop, size, fault)
            return
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command != "GET":
            return
        if ranged and stop < size:  # a part, no download
            self._copy(file, start, stop)
            return
        cut, stall = self.hub.cut.pop(file.name, None), self.hub.stall.pop(file.name, None)
        self._copy(file, start, stop if cut is None and stall is None else min(stop, start + (cut or stall or 0)))
        if stall is not None:
            self.hub.silent.set()
            self.hub.closing.wait(60)
        if cut is not None or stall is not None:
            self.close_connection = True

    def _range(self, size: int) -> tuple[int, int, bool]:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None or self.hub.whole:
            return 0, size, False
        return int(found[1]), min(int(found[2] or size - 1) + 1, size), True

    def _copy(self, file: Path, start: int, stop: int) -> None:
        """Sends a part of a file."""
        with file.open("rb") as data:
            data.seek(start)
            while start < stop and (part := data.read(min(2**16, stop - start))):
                self.request_seen.sent += len(part)  # whoever gets it may look at the count at once
                self.wfile.write(part)
                start += len(part)

    def _faulty(self, file: Path, start: int, stop: int, size: int, fault: str) -> None:
        """An answer that is wrong in one way; the connection ends with it."""
        self.close_connection = True
        if fault == "hangs up once":
            del self.hub.faults[file.name]
            return
        said = {"elsewhere": f"bytes {start + 1}-{stop}/{size}", "nonsense": "bytes"}
        said["another file"] = f"bytes {start}-{stop - 1}/{size + 1}"
        length = {"longer": stop - start + 1, "shorter": stop - start - 1}.get(fault, stop - start)
        self.send_response(416 if fault == "not there" else 206)
        self.send_header("Content-Range", said.get(fault, f"bytes {start}-{stop - 1}/{size}"))
        if fault == "compressed":
            self.send_header("Content-Encoding", "gzip")
        if fault != "endless":  # without a length it goes on until one of the two hangs up
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if fault in ("slow", "silent"):
            self.wfile.write(b"\x10")
            while fault == "slow" and not self.hub.closing.wait(0.01):
                self.wfile.write(b"\0")
            self.hub.closing.wait(60)
        for _ in range(2**14 if fault == "endless" else 1):
            self.wfile.write((b"\xff" if fault == "garbage" else b"\0") * length)
            self.request_seen.sent += length
