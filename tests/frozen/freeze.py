"""Freezes a small cache of the format this program writes; run once for each format."""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from cache import KnowledgeCache  # noqa: E402
from cache.header import FORMAT  # noqa: E402


def facts(path: Path) -> dict:
    """Everything a reader can learn from a cache, as plain data."""
    with KnowledgeCache.open(path, verify="full") as found:
        blocks = {}
        for name, block in found.blocks.items():
            entries = [
                {
                    "class": entry.class_id,
                    "item": entry.item,
                    "source": entry.source_digest,
                    "values": {
                        column: value.tolist() if hasattr(value, "tolist") else value
                        for column, value in entry.values.items()
                    },
                }
                for entry in block.entries()
            ]
            blocks[name] = {
                "id": block.id,
                "kind": block.kind,
                "spec": dict(block.spec),
                "layers": list(block.layers),
                "keys": list(block.keys()),
                "entries": entries,
            }
        return {
            "content_id": found.content_id,
            "dataset": found.dataset,
            "classes": [[c.id, c.name, c.modality, c.source] for c in found.classes],
            "recipe": found.recipe,
            "provenance": found.provenance,
            "blocks": blocks,
        }


def main() -> None:
    """Writes `format-N.h5` and what it holds."""
    spec = importlib.util.spec_from_file_location("make", HERE.parent / "cache" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    target = HERE / f"format-{FORMAT}.h5"
    if target.exists():
        sys.exit(f"{target.name} is frozen")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.h5"
        make.cache_at(path)
        target.write_bytes(path.read_bytes())
    listing = json.dumps(facts(target), ensure_ascii=False, indent=1, sort_keys=True)
    target.with_suffix(".json").write_text(listing + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
