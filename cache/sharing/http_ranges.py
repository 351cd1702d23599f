"""Pieces of a file on a web server."""

import importlib
import io
from typing import Any

from cache.errors import StorageError


class HttpRanges:
    """A file on a web server; one request for each read, and never more in memory than asked for.

    fsspec's own file reads whatever a server sends for a range, however long.

    Args:
        address: of the file.
        shown: what messages call it.
    """

    def __init__(self, address: str, shown: str) -> None:
        options = {"trust_env": True}
        self._system: Any = importlib.import_module("fsspec").filesystem(
            "http", client_kwargs=options
        )
        self._address, self._shown, self._at = address, shown, 0
        self._size = int(self._system.info(address)["size"] or 0)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves; returns where to."""
        self._at = self._size if whence == io.SEEK_END else offset
        return self._at

    def read(self, length: int) -> bytes:
        """At most `length` bytes.

        Raises:
            StorageError: the server does not answer ranges.
        """
        wanted = f"bytes={self._at}-{self._at + length - 1}"
        headers = {"Accept-Encoding": "identity", "Range": wanted}
        stream = self._system.open(self._address, "rb", block_size=0, size=1, headers=headers)
        try:
            if stream.r.status != 206:
                what = "the server does not answer ranges"
                raise StorageError(what, where=self._shown, do="Pull the file first.")
            raw = bytearray()
            while len(raw) < length and (piece := stream.read(length - len(raw))):
                raw += piece
        finally:
            stream.close()
        return bytes(raw)

    def close(self) -> None:
        """Nothing is kept open."""
        self._at = 0
