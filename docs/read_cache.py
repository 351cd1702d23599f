"""A reader of knowledge caches: standard library only, written from cache/FORMAT.md."""

import json
import math
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from struct import calcsize, pack, unpack

CODES = {"u1": "B", "i8": "q", "f2": "e", "f4": "f"}
INTS = {"prompt_tokens", "text_tokens", "rank"}
TEXTS = ["text", "prompt", "prompt_tokens", "text_tokens"]
COLUMNS = {"texts": TEXTS, "attributes": ["attribute", "value", "rank"]}


def need(condition, what):
    """Stops unless the condition holds."""
    if not condition:
        raise ValueError(f"refused: {what}")


def digest_of(value):
    """SHA-256 of canonical JSON."""
    raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
    return sha256(raw).hexdigest()


def read(path, expect=None):
    """The content id, and {(block, class id, item): {column: value}}; arrays are flat tuples."""
    raw = memoryview(Path(path).read_bytes())
    end = 48 + int.from_bytes(raw[8:16], "little")
    need(raw[:8] == b"VADEMC\0\x01" and 50 <= end <= len(raw), "not a cache of format 1")
    need(sha256(raw[48:end]).digest() == raw[16:48], "the header is damaged")
    head = json.loads(bytes(raw[48:end]))
    content, at, identity = head["content"], head["userblock"], digest_of(head["content"])
    need(digest_of(head) == raw[16:48].hex() and head["size"] == len(raw), "a wrong header or size")
    need((content["format"], content["kind"]) == (1, "knowledge"), "another format or kind")
    need(expect in {None, identity}, "another content id")
    need(not any(raw[end:at]), "the padding is not zero")
    data, rest = {}, sha256()
    for name, start in sorted(head["layout"].items(), key=lambda pair: pair[1]):
        dataset = content["datasets"][name]
        size = math.prod(dataset["shape"]) * calcsize(CODES[dataset["dtype"]])
        need(not size or at <= start <= len(raw) - size, f"{name} overlaps or is outside")
        data[name] = raw[start : start + size]
        need(sha256(data[name]).hexdigest() == dataset["sha256"], f"{name} is damaged")
        if size:
            rest.update(raw[at:start])
            at = start + size
    rest.update(raw[at:])
    need(rest.hexdigest() == head["rest"], "the HDF5 part is damaged")
    return identity, dict(entries(content, data))


def pieces(data, name, offsets, row=1):
    """The bytes of each entry in a dataset of `row` bytes a row."""
    bounds = data[offsets].cast("q").tolist()
    sound = bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] * row == len(data[name])
    need(sound, f"{offsets} is wrong")
    return [data[name][first * row : last * row] for first, last in pairwise(bounds)]


def values(data, name, column, block):
    """One column of a block: for every entry what its digest covers, and its value."""
    full = f"{name}__{column}"
    if column in INTS:
        return [(pack("<q", n), n) for n in data[full].cast("q")]
    if column != "values":
        texts = pieces(data, full, full + "_offsets")
        return [(pack("<q", len(raw)) + bytes(raw), str(raw, "utf-8")) for raw in texts]
    code, width = CODES[block["dtype"]], block["width"] * max(1, len(block["layers"]))
    row = width * calcsize(code)
    arrays = [(len(raw) // row, raw) for raw in pieces(data, full, f"{name}__offsets", row)]
    return [(pack("<q", n) + raw, unpack(f"<{n * width}{code}", raw)) for n, raw in arrays]


def entries(content, data):
    """Every entry, after comparing its digest."""
    ids = [str(raw, "utf-8") for raw in pieces(data, "classes__id", "classes__id_offsets")]
    for name, block in content["blocks"].items():
        names = COLUMNS.get(block["kind"], ["values"])
        columns = [values(data, name, column, block) for column in names]
        kind, item, digests = (data[f"{name}__{c}"] for c in ("class", "item", "digests"))
        places = zip(kind.cast("q"), item.cast("q"), range(0, len(digests), 32), strict=True)
        for (index, number, at), *found in zip(places, *columns, strict=True):
            digest = sha256(b"".join(covered for covered, _ in found)).digest()
            need(digest == digests[at : at + 32], f"an entry of block {name} is damaged")
            yield (name, ids[index], number), dict(zip(names, [v for _, v in found], strict=True))
