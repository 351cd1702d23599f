"""Token ids of generated answers, kept beside the shards until the cache is sealed.

A model under another quantisation reads the very tokens that were generated; text would have to be
tokenised again, and not every sequence of tokens is what its own text gives.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cache.durable import storage_errors, write_atomic
from cache.recipe import canonical_json, digest_of

PREFIX = "answers-"


class AnswerIds:
    """Answers by entry key, in a folder; what is damaged counts as absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: dict[str, list[int]] = {}
        for path in sorted(folder.glob(f"{PREFIX}*.json")) if folder.is_dir() else ():
            with suppress(OSError, ValueError, TypeError, KeyError):
                record = json.loads(path.read_text("ascii"))
                if record["sha256"] == digest_of(record["ids"]):
                    self._ids |= {str(k): [int(i) for i in v] for k, v in record["ids"].items()}

    def __contains__(self, key: object) -> bool:
        return key in self._ids

    def __getitem__(self, key: str) -> Sequence[int]:
        return self._ids[key]

    def add(self, ids: Mapping[str, Sequence[int]]) -> None:
        """Keeps answers, durably; an answer that is known already stays as it is.

        Raises:
            StorageError: no space or no permission.
        """
        new = {key: list(answer) for key, answer in ids.items() if key not in self._ids}
        if new:
            digest = digest_of(new)
            record = canonical_json({"ids": new, "sha256": digest}) + b"\n"
            write_atomic(self._folder / f"{PREFIX}{digest[:32]}.json", record)
            self._ids |= new

    def remove(self) -> None:
        """Deletes every file; called when all work is done.

        Raises:
            StorageError: no permission.
        """
        with storage_errors(self._folder):
            for path in self._folder.glob(f"{PREFIX}*.json"):
                path.unlink(missing_ok=True)
