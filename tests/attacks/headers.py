"""Hostile headers and hostile contents under correct digests, and paths that are no files."""

import copy
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import make
import numpy as np
from hdf5_files import Attack
from test_header import ATTACKS as EDITS

from cache.blocks import entry_digest
from cache.header import LARGEST_HEADER, MAGIC
from cache.recipe import canonical_json

Body = dict[str, Any]


def _put(*keys: str, value: object) -> Callable[[Body], None]:
    def edit(body: Body) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return edit


def _recipe(value: object) -> Callable[[Body], None]:
    return _put("content", "recipe", value=value)


def _spec(value: object) -> Callable[[Body], None]:
    return _put("content", "blocks", "layers", "spec", value=value)


def _block_name(name: str) -> Callable[[Body], None]:
    def edit(body: Body) -> None:
        blocks = body["content"]["blocks"]
        blocks[name] = blocks.pop("layers")
        for table in (body["layout"], body["content"]["datasets"]):
            for old in [n for n in table if n.startswith("layers__")]:
                table[f"{name}__{old.removeprefix('layers__')}"] = table.pop(old)

    return edit


def _many_blocks(body: Body) -> None:
    content, layout = body["content"], body["layout"]
    for n in range(200):
        content["blocks"][f"b{n}"] = copy.deepcopy(content["blocks"]["attributes"])
        for old in [d for d in content["datasets"] if d.startswith("attributes__")]:
            new = old.replace("attributes__", f"b{n}__")
            content["datasets"][new], layout[new] = content["datasets"][old], layout[old]


def _layers_beyond(body: Body) -> None:
    body["content"]["blocks"]["layers"]["layers"] = [1, 2, 1 << 50]


def _values_over_the_root(body: Body) -> None:
    body["layout"]["layers__values"] = body["userblock"]


def _swapped_offsets(body: Body) -> None:
    layout = body["layout"]
    layout["layers__keys"], layout["layers__digests"] = (
        layout["layers__digests"],
        layout["layers__keys"],
    )


def _swapped_datasets(body: Body) -> None:
    _swapped_offsets(body)
    datasets = body["content"]["datasets"]
    datasets["layers__keys"], datasets["layers__digests"] = (
        datasets["layers__digests"],
        datasets["layers__keys"],
    )


def _moved_by_64(body: Body) -> None:
    body["layout"]["recipe"] += 64


def _overflowing(body: Body) -> None:
    for name in ("keys", "digests", "sources"):
        body["content"]["datasets"][f"layers__{name}"]["shape"] = [1 << 47, 32]


def _overflowing_int64(body: Body) -> None:
    body["content"]["datasets"]["layers__values"]["shape"] = [1 << 47, 3, 5]
    body["content"]["blocks"]["layers"]["width"] = 1 << 24


def _zero_of_many(body: Body) -> None:
    body["content"]["datasets"]["layers__values"]["shape"] = [0, 1 << 47, 5]


def _less_data(body: Body) -> None:
    dataset = body["content"]["datasets"]["recipe"]
    dataset["shape"] = [dataset["shape"][0] - 1]


MORE_EDITS: dict[str, Callable[[Body], Any]] = {
    "recipe 32k values": _recipe({"a": [1] * 33000}),
    "recipe 100k keys": _recipe({f"{n:x}": 1 for n in range(80000)}),
    "recipe 300k lists": _recipe({"a": [[]] * 300000}),
    "recipe of bidi": _recipe({"\u202egnp.exe": 1}),
    "recipe of Cyrillic": _recipe({"dаtaset": "a"}),
    "recipe of 5000 characters": _recipe({"a": "x" * 5000}),
    "recipe home": _recipe({"a": "~root/x"}),
    "recipe drive": _recipe({"a": "C:/x"}),
    "recipe parent": _recipe({"a": "x/../y"}),
    "recipe surrogate": _recipe({"a": "\ud800"}),
    "recipe zero byte": _recipe({"a": "x\0y"}),
    "recipe terminal": _recipe({"a": "\x1b[2J"}),
    "spec path": _spec({"model": "/etc/passwd"}),
    "spec traversal": _spec({"model": "../../x"}),
    "spec text": _spec({"model": "two words"}),
    "spec null key": _spec({"": 1}),
    "spec null": _spec(None),
    "spec string": _spec("states"),
    "block named ..": _block_name(".."),
    "block named with a slash": _block_name("../layers"),
    "block named in Cyrillic": _block_name("lаyers"),
    "block named right to left": _block_name("\u202esreyal"),
    "block of 5000 characters": _block_name("a" * 5000),
    "block named classes": _block_name("classes"),
    "block with two bars": _block_name("layers__values"),
    "blocks by the hundred": _many_blocks,
    "layer beyond": _layers_beyond,
    "dataset id of 5000": _put("content", "dataset", value="x" * 5000),
    "dataset id in Cyrillic": _put("content", "dataset", value="tоy"),
    "dataset id null": _put("content", "dataset", value=None),
    "empty key": lambda body: body["content"].update({"": 1}),
    "empty key instead": lambda body: body["content"].update({"": body["content"].pop("recipe")}),
    "format text": _put("content", "format", value="1"),
    "format null": _put("content", "format", value=None),
    "format huge": _put("content", "format", value=2**53 - 1),
    "format negative": _put("content", "format", value=-1),
    "kind null": _put("content", "kind", value=None),
    "kind unknown": _put("content", "kind", value="pickle"),
    "rest short": _put("rest", value="ab" * 31),
    "rest newline": _put("rest", value="ab" * 32 + "\n"),
    "size zero": _put("size", value=0),
    "size huge": _put("size", value=2**53 - 1),
    "size true": _put("size", value=True),
    "user block zero": _put("userblock", value=0),
    "user block negative": _put("userblock", value=-4096),
    "user block text": _put("userblock", value="8192"),
    "user block 16384": _put("userblock", value=16384),
    "shape overflow": _overflowing,
    "shape overflow with width": _overflowing_int64,
    "shape zero of many": _zero_of_many,
    "shape shorter": _less_data,
    "values over the root": _values_over_the_root,
    "offsets swapped": _swapped_offsets,
    "data sets swapped": _swapped_datasets,
    "dataset moved": _moved_by_64,
}


def _ends(text: bytes, old: bytes, new: bytes) -> bytes:
    return text.replace(old, new, 1)


def _nested(text: bytes, opening: bytes, closing: bytes, depth: int) -> bytes:
    body = json.loads(text)
    body["content"]["recipe"] = {"a": "HERE"}
    return _ends(canonical_json(body), b'"HERE"', opening * depth + closing * depth)


FORMAT = b'"format":1'
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "float": lambda t: _ends(t, FORMAT, b'"format":1.0'),
    "exponent": lambda t: _ends(t, FORMAT, b'"format":1e0'),
    "infinite exponent": lambda t: _ends(t, FORMAT, b'"format":1e999'),
    "NaN": lambda t: _ends(t, FORMAT, b'"format":NaN'),
    "Infinity": lambda t: _ends(t, FORMAT, b'"format":Infinity'),
    "minus Infinity": lambda t: _ends(t, FORMAT, b'"format":-Infinity'),
    "minus zero": lambda t: _ends(t, FORMAT, b'"format":-0'),
    "leading zero": lambda t: _ends(t, FORMAT, b'"format":01'),
    "plus": lambda t: _ends(t, FORMAT, b'"format":+1'),
    "5000 digits": lambda t: _ends(t, FORMAT, b'"format":' + b"9" * 5000),
    "18 digits": lambda t: _ends(t, FORMAT, b'"format":' + b"9" * 18),
    "a key twice": lambda t: _ends(t, FORMAT, FORMAT + b"," + FORMAT),
    "a key twice by escape": lambda t: _ends(t, FORMAT, b'"f\\u006frmat":2,' + FORMAT),
    "space": lambda t: _ends(t, FORMAT, b'"format": 1'),
    "newline at the end": lambda t: t + b"\n",
    "zero byte at the end": lambda t: t + b"\0",
    "two values": lambda t: t + t,
    "comment": lambda t: b"/**/" + t,
    "unsorted": lambda t: json.dumps(
        dict(reversed(json.loads(t).items())), separators=(",", ":")
    ).encode(),
    "upper-case escape": lambda t: _ends(t, b'"toy"', b'"to\\u0079"'),
    "UTF-8": lambda t: _ends(t, b"toy", "tö".encode()),
    "UTF-8 with a mark": lambda t: b"\xef\xbb\xbf" + t,
    "UTF-16": lambda t: t.decode().encode("utf-16"),
    "UTF-32": lambda t: t.decode().encode("utf-32"),
    "Latin-1": lambda t: _ends(t, b"toy", b"t\xf6y"),
    "not closed": lambda t: t[:-1],
    "lists 3000 deep": lambda t: b"[" * 3000 + b"]" * 3000,
    "lists 500k deep": lambda t: b"[" * 500000 + b"]" * 500000,
    "tables 100k deep": lambda t: b'{"a":' * 100000 + b"1" + b"}" * 100000,
    "recipe 33 deep": lambda t: _nested(t, b"[", b"]", 33),
    "recipe 300 deep": lambda t: _nested(t, b"[", b"]", 300),
    "recipe 900 deep": lambda t: _nested(t, b"[", b"]", 900),
    "recipe 980 tables deep": lambda t: _nested(t, b'{"a":', b"}", 980).replace(b":}", b":1}"),
    "number": lambda t: b"12",
    "string": lambda t: b'"' + b"x" * 100 + b'"',
    "null": lambda t: b"null",
    "empty table": lambda t: b"{}",
    "spaces only": lambda t: b" " * 1000,
    "one mebibyte of commas": lambda t: b"[" + b"0," * 500000 + b"0]",
    "one mebibyte of quotes": lambda t: b'["' + b"\\u0041" * 170000 + b'"]',
    "pickle": lambda t: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}

PREFIXES: dict[str, Callable[[bytes], bytes]] = {
    "length zero": lambda raw: raw[:8] + bytes(8) + raw[16:],
    "length one": lambda raw: raw[:8] + (1).to_bytes(8, "little") + raw[16:],
    "length beyond the limit": lambda raw: (
        raw[:8] + (LARGEST_HEADER + 1).to_bytes(8, "little") + raw[16:]
    ),
    "length 2^63": lambda raw: raw[:8] + (1 << 63).to_bytes(8, "little") + raw[16:],
    "length beyond the file": lambda raw: raw[:8] + (1 << 20).to_bytes(8, "little") + raw[16:],
    "big-endian length": lambda raw: raw[:8] + raw[8:16][::-1] + raw[16:],
    "version 2": lambda raw: MAGIC[:7] + b"\x02" + raw[8:],
    "magic in lower case": lambda raw: raw[:6].lower() + raw[6:],
    "digest of nothing": lambda raw: raw[:16] + bytes(32) + raw[48:],
    "padding used": lambda raw: raw[:8180] + b"HIDDEN" + raw[8186:],
}


# ---- contents that no writer would have written, in files that are right in every other respect

Arrays = dict[str, np.ndarray]
Content = Callable[[Body, Arrays], None]


def _text(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, np.uint8)


def _column(name: str, texts: list[bytes]) -> Content:
    def change(content: Body, arrays: Arrays) -> None:
        arrays[name] = _text(b"".join(texts))
        ends = np.cumsum([0, *map(len, texts)])
        arrays[f"{name}_offsets"] = ends.astype("<i8")

    return change


def _set(name: str, row: int, value: float) -> Content:
    def change(content: Body, arrays: Arrays) -> None:
        arrays[name].reshape(-1)[row] = value

    return change


def _all(name: str, raw: bytes) -> Content:
    def change(content: Body, arrays: Arrays) -> None:
        arrays[name] = _text(raw)

    return change


def _no_entries(content: Body, arrays: Arrays) -> None:
    """Rows that belong to no entry: a place to hide data."""
    for name in ("keys", "digests", "sources", "class", "item"):
        arrays[f"layers__{name}"] = arrays[f"layers__{name}"][:0]
    arrays["layers__offsets"] = arrays["layers__offsets"][:1]


def _no_entries_of_text(content: Body, arrays: Arrays) -> None:
    for name in ("keys", "digests", "sources", "class", "item", "prompt_tokens", "text_tokens"):
        arrays[f"answers__{name}"] = arrays[f"answers__{name}"][:0]
    for name in ("text", "prompt"):
        arrays[f"answers__{name}_offsets"] = arrays[f"answers__{name}_offsets"][:1]


def _many_classes(content: Body, arrays: Arrays) -> None:
    rows = [f"c{n:06d}".encode() for n in range(15000)]
    for name in ("id", "name"):
        _column(f"classes__{name}", rows)(content, arrays)
    for name in ("modality", "source"):
        _column(f"classes__{name}", [b""] * len(rows))(content, arrays)


def _rightly_digested(change: Content) -> Content:
    """The change, with the entry digests of `layers` made right."""

    def both(content: Body, arrays: Arrays) -> None:
        change(content, arrays)
        values, ends = arrays["layers__values"], arrays["layers__offsets"]
        found = [
            entry_digest("states", {"values": values[a:b]}) for a, b in itertools.pairwise(ends)
        ]
        arrays["layers__digests"] = np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)

    return both


def _unsorted(content: Body, arrays: Arrays) -> None:
    arrays["layers__class"] = arrays["layers__class"][::-1].copy()


IDS = [b"a-b.c", b"basophil", b"ig"]
MARKS = "\u0301\u0316".encode() * 60000
CONTENTS: dict[str, Content] = {
    "class id of traversal": _column("classes__id", [b"../../../x", *IDS[1:]]),
    "class id with a slash": _column("classes__id", [b"a/b", *IDS[1:]]),
    "class id in Cyrillic": _column("classes__id", ["а-b.c".encode(), *IDS[1:]]),
    "class id right to left": _column("classes__id", ["a\u202eb".encode(), *IDS[1:]]),
    "class id of 5000": _column("classes__id", [b"a" * 5000, *IDS[1:]]),
    "class id twice": _column("classes__id", [b"a-b.c", b"basophil", b"basophil"]),
    "class id empty": _column("classes__id", [b"", *IDS[1:]]),
    "class id with a newline": _column("classes__id", [b"a-b.c\n", *IDS[1:]]),
    "class ids unsorted": _column("classes__id", IDS[::-1]),
    "class name a path": _column("classes__name", [b"/etc/passwd", b"b", b"c"]),
    "class name empty": _column("classes__name", [b"", b"b", b"c"]),
    "class name not UTF-8": _column("classes__name", [b"\xff\xfe", b"b", b"c"]),
    "class name of surrogates": _column("classes__name", [b"\xed\xa0\x80", b"b", b"c"]),
    "class name not composed": _column("classes__name", ["A\u030a".encode(), b"b", b"c"]),
    "class name of 120k marks": _column("classes__name", [b"a" + MARKS, b"b", b"c"]),
    "15k classes": _many_classes,
    "class offsets backwards": _set("classes__id_offsets", 1, 1 << 40),
    "class offsets negative": _set("classes__id_offsets", 0, -1),
    "class number negative": _set("layers__class", 0, -1),
    "class number beyond": _set("layers__class", -1, 3),
    "class number 2^62": _set("layers__class", -1, 1 << 62),
    "classes unsorted": _unsorted,
    "item negative": _set("layers__item", 0, -1),
    "item 2^62": _set("layers__item", -1, 1 << 62),
    "item twice": _set("layers__item", 1, 0),
    "row offsets backwards": _set("layers__offsets", 1, 99),
    "row offsets negative": _set("layers__offsets", 1, -5),
    "row offsets past the end": _set("layers__offsets", -1, 1 << 40),
    "row offsets not from 0": _set("layers__offsets", 0, 1),
    "entry without rows": _set("layers__offsets", 1, 0),
    "text offsets backwards": _set("answers__text_offsets", 2, 0),
    "text offsets past the end": _set("answers__text_offsets", -1, 1 << 40),
    "values NaN": _set("layers__values", 3, np.nan),
    "values infinite": _set("layers__values", 3, np.inf),
    "values NaN, digest right": _rightly_digested(_set("layers__values", 3, np.nan)),
    "no rows, digest right": _rightly_digested(_set("layers__offsets", 1, 0)),
    "values other": _set("layers__values", 3, 7.0),
    "key other": _set("layers__keys", 3, 1),
    "digest other": _set("layers__digests", 3, 1),
    "source other": _set("layers__sources", 3, 1),
    "text not UTF-8": _set("answers__text", 3, 255),
    "integer other": _set("answers__prompt_tokens", 0, -(1 << 63)),
    "recipe not JSON": _all("recipe", b"{"),
    "recipe a list": _all("recipe", b"[]"),
    "recipe 900 deep": _all("recipe", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "recipe 500k deep": _all("recipe", b"[" * 500000 + b"]" * 500000),
    "recipe NaN": _all("recipe", b'{"a":NaN}'),
    "recipe 1e999": _all("recipe", b'{"a":1e999}'),
    "recipe of 5000 digits": _all("recipe", b'{"a":' + b"9" * 5000 + b"}"),
    "recipe a key twice": _all("recipe", b'{"a":1,"a":1}'),
    "recipe with a path": _all("recipe", b'{"a":"/etc/passwd"}'),
    "recipe other": _all("recipe", b'{"a":1}'),
    "recipe UTF-16": _all("recipe", '{"a":1}'.encode("utf-16")),
    "provenance of numbers": _all("provenance", b'{"licence":1}'),
    "provenance with a path": _all("provenance", b'{"a":"file:///etc/passwd"}'),
    "provenance 500k deep": _all("provenance", b'{"a":' * 90000 + b"1" + b"}" * 90000),
    "provenance empty": _all("provenance", b""),
    "rows of no entry": _no_entries,
    "texts of no entry": _no_entries_of_text,
}


def _special(folder: Path) -> list[Attack]:
    """Paths that are no regular files, or lead nowhere."""
    names = ("fifo", "link-to-fifo", "loop", "a-loop", "dangling", "empty", "folder", "socket")
    place = {name: folder / f"special-{name}" for name in names}
    os.mkfifo(place["fifo"])
    place["link-to-fifo"].symlink_to(place["fifo"])
    place["loop"].symlink_to(place["loop"])
    place["a-loop"].symlink_to(folder / "special-b-loop")
    (folder / "special-b-loop").symlink_to(place["a-loop"])
    place["dangling"].symlink_to(folder / "nowhere")
    place["empty"].write_bytes(b"")
    place["folder"].mkdir()
    os.mknod(place["socket"], 0o600 | 0o140000)
    place["under-a-fifo"] = place["fifo"] / "x"
    place["name-too-long"] = folder / ("x" * 300)
    for device in ("/dev/zero", "/dev/full", "/dev/null"):
        place[device] = Path(device)
    place["link-to-device"] = folder / "special-zero"
    place["link-to-device"].symlink_to("/dev/zero")
    place["sparse"] = folder / "special-sparse"
    with place["sparse"].open("wb") as file:
        file.write(MAGIC + LARGEST_HEADER.to_bytes(8, "little"))
        file.truncate(1 << 40)
    return [Attack(name, "special", path) for name, path in place.items()]


def build(folder: Path, sealed: bytes) -> list[Attack]:
    """Writes every hostile header, content and special file into `folder`."""
    made, sound = [], folder / "sound.h5"
    sound.write_bytes(sealed)
    userblock = make.body_of(sound)["userblock"]

    def place(form: str, name: str) -> Path:
        path = folder / f"{form}-{len(made):03d}.h5"
        path.write_bytes(sealed)
        made.append(Attack(name, form, path))
        return path

    edits = {name: edit for name, (edit, _) in EDITS.items()} | MORE_EDITS
    for name, edit in edits.items():
        make.reforge(place("header", name), edit)
    for name, spell in TEXTS.items():
        path = place("header", name)
        make.put_header(path, spell(forge.header_text(path)), userblock)
    for name, spoil in PREFIXES.items():
        path = place("prefix", name)
        path.write_bytes(spoil(sealed))
    for name, change in CONTENTS.items():
        forge.repack(place("content", name), sound, change)
    return made + _special(folder)
