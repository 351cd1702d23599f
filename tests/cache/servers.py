"""Servers on loopback: one that serves files over HTTP, well or badly, and one like the hub."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Files by path, and how badly they are served."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # whether Range is honoured
        self.cuts: list[int] = []  # bytes after which the next connections end
        self.status = 0  # sent for everything
        self.length_off_by = 0  # what Content-Length adds to the truth
        self.hold = threading.Event()  # where a cut connection waits instead of ending
        self.hold.set()
        self.asked: list[tuple[str, int]] = []  # path and first byte of every GET
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that went away."""


class _Files(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        data = self.server.files.get(path)
        if data is None or self.server.status:
            self.send_error(self.server.status or 404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.server.ranges else 0
        self.server.asked.append((path, int(wanted[1]) if wanted else 0))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        length = len(data) - start + self.server.length_off_by
        self.send_header("Content-Length", str(length))
        self.end_headers()
        body = data[start : start + length]
        cut = self.server.cuts.pop(0) if self.server.cuts and path.endswith(".h5") else None
        self.close_connection = cut is not None or self.server.length_off_by > 0
        try:
            self.wfile.write(body[:cut])
            if cut is not None:
                time.sleep(0.2 if cut else 0)  # the client reads what was sent
                self.server.hold.wait(60)
        except OSError:
            self.close_connection = True  # the client had enough


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler] = _Files) -> Iterator[FileServer]:
    """A running server, stopped at the end."""
    server = FileServer(handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's HTTP API that reading and committing a file use; LFS for `.h5`.

    Repository `lab/knowledge`, branch main. `server.files` holds the objects by path.
    """

    server: FileServer
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, body: Any, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _missing(self, code: str) -> None:
        self._send({"error": code}, 404, X_Error_Code=code)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _entry(self, path: str) -> dict[str, Any]:
        data = self.server.files[path]
        oid = hashlib.sha1(data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        if path.endswith(".h5"):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        return entry

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        if re.fullmatch(r"/api/models/lab/knowledge(/revision/main)?", path):
            siblings = [{"rfilename": name} for name in files]
            self._send({"id": "lab/knowledge", "sha": "0" * 40, "siblings": siblings})
        elif path.startswith("/api/models/lab/knowledge/tree/main"):
            self._send([self._entry(name) for name in sorted(files)])
        elif path.startswith("/lab/knowledge/resolve/main/"):
            name = path.removeprefix("/lab/knowledge/resolve/main/")
            if name not in files:
                self._missing("EntryNotFound")
                return
            data, etag = files[name], hashlib.sha256(files[name]).hexdigest()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            self.server.asked.append((name, int(wanted[1]) if wanted else 0))
            facts = {"ETag": f'"{etag}"', "X_Repo_Commit": "0" * 40}
            if wanted is None:
                self._send(data, 200, **facts)
                return
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            facts["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(data[first : last + 1], 206, **facts)
        else:
            self._missing("RepoNotFound")

    def do_PUT(self) -> None:
        digest = self.path.removeprefix("/lfs/")
        data = self._body()
        if hashlib.sha256(data).hexdigest() != digest:
            self._send({"error": "another digest"}, 400)
            return
        type(self).objects[digest] = data
        self._send({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self._body()
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".h5") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif path.endswith("/paths-info/main"):
            names = json.loads(body)["paths"]
            self._send([self._entry(name) for name in names if name in self.server.files])
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            for line in body.splitlines():
                self._commit(json.loads(line))
            url = f"{self.server.address}/lab/knowledge/commit/{'0' * 40}"
            self._send({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._missing("RepoNotFound")

    def _commit(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            self.server.files[value["path"]] = type(self).objects[value["oid"]]


def hub() -> type[Hub]:
    """A hub without objects."""
    return type("EmptyHub", (Hub,), {"objects": {}})
