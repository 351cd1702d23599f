"""A web server for one folder on loopback that answers ranges, slowly if asked, and counts."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves `folder`; `requests` counts, `latency` is waited before each answer."""

    daemon_threads = True

    def __init__(self, folder: Path, latency: float = 0.0, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.ranges = folder, latency, ranges
        self.requests, self.sent = 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RangeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.requests += 1
        time.sleep(self.server.latency)
        path = self.server.folder / Path(self.path.partition("?")[0]).name
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(n) for n in found.groups()) if found else (0, size - 1)
        ranged = bool(found) and self.server.ranges
        first, last = (first, min(last, size - 1)) if ranged else (0, size - 1)
        self.send_response(206 if ranged else 200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            with path.open("rb") as file:
                file.seek(first)
                self.server.sent += self.wfile.write(file.read(last - first + 1))


@contextmanager
def serving(folder: Path, latency: float = 0.0, *, ranges: bool = True) -> Iterator[RangeServer]:
    """A server of `folder` while the context lasts."""
    server = RangeServer(folder, latency, ranges=ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
