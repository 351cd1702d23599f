"""A toy problem for whole runs: separable images on disk, a sealed cache, a tiny backbone.

Imported by path, from conftest.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from cache import BlockSpec, ClassRecord, Entry, ExtractionHeader, ShardFolder, seal

CLASSES = ("eosinophil", "monocyte", "platelet")
COLOURS = ((220, 60, 60), (60, 200, 60), (60, 60, 220))
DATASET = "toy-cells"
LAYERS, WIDTH = 9, 20


def images(folder: Path, *, train: int = 6, val: int = 2, test: int = 4, size: int = 32) -> Path:
    """`folder/split/class/n.png`: noisy squares whose colour tells the class."""
    random = np.random.default_rng(7)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for name, colour in zip(CLASSES, COLOURS, strict=True):
            place = folder / split / name
            place.mkdir(parents=True)
            for n in range(count):
                noise = random.integers(-40, 40, (size, size, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{n}.png")
    declaration = folder.parent / f"{folder.name}.yaml"
    declaration.write_text(
        f"dataset: {DATASET}\nlayout: folder\npath: {folder.name}\n"
        "modality: blood smear\n"
        "template: 'a photo of a {}.'\n"
        "templates: ['a photo of a {}.', 'a picture of a {}.']\n"
        "classes:\n" + "".join(f"  - {{id: {c}, name: {c}}}\n" for c in CLASSES)
    )
    return declaration


COLOUR_WORDS = ("red", "green", "blue")


def _texts(name: str, k: int) -> list[Entry]:
    """Descriptions (5 each), symptoms (2, 3, 4) and ranked attributes of one class."""
    word, other = COLOUR_WORDS[k % 3], COLOUR_WORDS[(k + 1) % 3]
    texts = {
        "descriptions": [f"a {word} cell number {i} called {name}" for i in range(5)],
        "symptoms": [f"{word} {what}" for what in ("cell", "patch", "square", "noise")[: 2 + k]],
    }
    entries = []
    for block, found in texts.items():
        for i, text in enumerate(found):
            columns = {"text": text, "prompt": "", "prompt_tokens": 0, "text_tokens": 0}
            source = hashlib.sha256(text.encode()).hexdigest()
            entries.append(Entry(block, name, i, columns, source))
    ranked = [("colour", word, 1), ("colour", other, 2), ("shape", "square", 1)]
    for i, (attribute, value, rank) in enumerate(ranked):
        columns = {"attribute": attribute, "value": value, "rank": rank}
        source = hashlib.sha256(f"{attribute}/{value}".encode()).hexdigest()
        entries.append(Entry("attributes", name, i, columns, source))
    return entries


def cache(path: Path, *, classes: tuple[str, ...] = CLASSES, modality: str = "blood smear") -> str:
    """A sealed cache with all kinds of rows and texts, ragged ones included; returns its id."""
    random = np.random.default_rng(3)
    spec = {"model": "ab" * 32}
    blocks = {
        "layers": BlockSpec("states", spec, "f4", tuple(range(1, LAYERS + 1)), WIDTH),
        "description_states": BlockSpec("states", spec | {"of": 1}, "f4", (4, 9), WIDTH),
        "attribute_states": BlockSpec("states", spec | {"of": 2}, "f4", (9,), WIDTH),
        "tokens": BlockSpec("states", spec | {"of": 3}, "f4", (4,), WIDTH),
    }
    blocks |= {
        "descriptions": BlockSpec("texts", {"of": 4}),
        "symptoms": BlockSpec("texts", {"of": 5}),
        "attributes": BlockSpec("attributes", {"of": 6}),
    }
    header = ExtractionHeader(
        DATASET, tuple(ClassRecord(c, c, modality) for c in classes), blocks, {"toy": 1}, {}
    )
    entries = []
    for k, name in enumerate(classes):
        entries += _texts(name, k)
        counts = {"layers": 1, "description_states": 9 + k, "attribute_states": 8, "tokens": 1}
        for block, items in counts.items():
            for item in range(items):
                rows = 9 + 2 * k if block == "tokens" else 1
                shape = (rows, len(blocks[block].layers), WIDTH)
                values = random.normal(size=shape).astype("f4")
                source = hashlib.sha256(f"{name}/{block}/{item}".encode()).hexdigest()
                entries.append(Entry(block, name, item, {"values": values}, source))
    folder = ShardFolder(path.with_name(path.name + ".parts"), header=header)
    folder.commit(entries, batch_shape=(len(entries),))
    return seal(folder, path)
