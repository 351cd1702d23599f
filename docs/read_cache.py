"""A reader of knowledge caches: standard library only, written from cache/FORMAT.md."""

import json
import math
from hashlib import sha256
from pathlib import Path
from struct import calcsize, pack, unpack

CODES = {"u1": "B", "i8": "q", "f2": "e", "f4": "f"}
TEXTS = ["text", "prompt", "prompt_tokens", "text_tokens"]
COLUMNS = {"texts": TEXTS, "attributes": ["attribute", "value", "rank"]}


def need(condition, what):
    """Stops unless the condition holds."""
    if not condition:
        raise ValueError(f"refused: {what}")


def digest_of(value):
    """SHA-256 of canonical JSON."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(path, expect=None):
    """The content id, and {(block, class id, item): {column: value}}; arrays are flat tuples."""
    raw = memoryview(Path(path).read_bytes())
    end = 48 + int.from_bytes(raw[8:16], "little")
    need(raw[:8] == b"VADEMC\0\x01" and 50 <= end <= len(raw), "not a cache of format 1")
    need(sha256(raw[48:end]).digest() == raw[16:48], "the header is damaged")
    head = json.loads(bytes(raw[48:end]))
    content, at, identity = head["content"], head["userblock"], digest_of(head["content"])
    known = digest_of(head), head["size"], content["format"], content["kind"]
    need(known == (raw[16:48].hex(), len(raw), 1, "knowledge"), "a wrong header, size or kind")
    need(expect in {None, identity}, "another content id")
    data, rest, padding = {}, sha256(), raw[end:at]
    for name, start in sorted(head["layout"].items(), key=lambda pair: pair[1]):
        shape, code, digest = (content["datasets"][name][k] for k in ("shape", "dtype", "sha256"))
        size = math.prod(shape) * calcsize(CODES[code])
        need(not size or at <= start <= len(raw) - size, f"{name} overlaps or is outside")
        data[name] = raw[start : start + size]
        need(sha256(data[name]).hexdigest() == digest, f"{name} is damaged")
        rest.update(raw[at:start])
        at = max(at, start + size)
    rest.update(raw[at:])
    need(rest.hexdigest() == head["rest"] and not any(padding), "the HDF5 part is damaged")
    return identity, dict(entries(content, data))


def pieces(data, name, offsets, row=1):
    """The bytes of each entry in a dataset of `row` bytes a row."""
    bounds = data[offsets].cast("q").tolist()
    sound = bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] * row == len(data[name])
    need(sound, f"{offsets} is wrong")
    return [data[name][bounds[i] * row : bounds[i + 1] * row] for i in range(len(bounds) - 1)]


def values(data, full, block):
    """One column of a block: for every entry what its digest covers, and its value."""
    if full.endswith("__values"):
        code, width = CODES[block["dtype"]], block["width"] * max(1, len(block["layers"]))
        rows = pieces(data, full, full[:-6] + "offsets", width * calcsize(code))
        each = [(len(raw) // calcsize(code), raw) for raw in rows]
        return [(pack("<q", n // width) + raw, unpack(f"<{n}{code}", raw)) for n, raw in each]
    if (at := full + "_offsets") in data:
        return [(pack("<q", len(t)) + bytes(t), str(t, "utf-8")) for t in pieces(data, full, at)]
    return [(pack("<q", n), n) for n in data[full].cast("q")]


def entries(content, data):
    """Every entry, after comparing its digest."""
    ids = [str(raw, "utf-8") for raw in pieces(data, "classes__id", "classes__id_offsets")]
    for name, block in content["blocks"].items():
        names = COLUMNS.get(block["kind"], ["values"])
        columns = zip(*(values(data, f"{name}__{column}", block) for column in names), strict=True)
        kind, item, digests = (data[f"{name}__{c}"] for c in ("class", "item", "digests"))
        places = zip(kind.cast("q"), item.cast("q"), range(0, len(digests), 32), strict=True)
        for (index, number, at), found in zip(places, columns, strict=True):
            covered = sha256(b"".join(part for part, _ in found)).digest()
            need(covered == digests[at : at + 32], f"an entry of block {name} is damaged")
            yield (name, ids[index], number), dict(zip(names, [v for _, v in found], strict=True))
