"""Hostile headers with correct digests: all are refused, and the message says why."""

import time

import pytest

from cache import KnowledgeCache, verify
from cache.errors import CacheFormatError
from cache.header import ALIGNMENT, check_block_name
from cache.recipe import canonical_json


def at(*keys, value=None, delete=False):
    """An edit that puts `value` at a place of the header."""

    def edit(body):
        for key in keys[:-1]:
            body = body[key]
        if delete:
            del body[keys[-1]]
        else:
            body[keys[-1]] = value(body[keys[-1]]) if callable(value) else value

    return edit


def dataset(name, **changes):
    def edit(body):
        body["content"]["datasets"][name].update(changes)

    return edit


def overlap(body):
    body["layout"]["layers__digests"] = body["layout"]["layers__keys"]


def rename(body):
    for table in (body["layout"], body["content"]["datasets"]):
        table["../../etc/passwd"] = table.pop("recipe")


def more_blocks(body):
    blocks = body["content"]["blocks"]
    blocks["another"] = dict(blocks["layers"])


def block(**changes):
    def edit(body):
        body["content"]["blocks"]["layers"].update(changes)

    return edit


BIG = 1 << 46
ATTACKS = {
    "list": (lambda body: [body], "the header is not a table"),
    "extra key": (lambda b: b.update(extra=1), "the header has other keys"),
    "no rest": (at("rest", delete=True), "the header has other keys"),
    "rest type": (at("rest", value=["ab"]), "rest is not a digest"),
    "content list": (at("content", value=[1]), "content is not a table"),
    "newer": (at("content", "format", value=2), r"made by a newer version \(format 2\)"),
    "true format": (at("content", "format", value=True), "content.format is not a version"),
    "zero format": (at("content", "format", value=0), "content.format is not a version"),
    "kind": (at("content", "kind", value=["shard"]), "content.kind is unknown"),
    "kind mismatch": (at("content", "kind", value="shard"), "content has other keys"),
    "dataset path": (at("content", "dataset", value="../../x"), "content.dataset is not an id"),
    "dataset type": (at("content", "dataset", value=3), "content.dataset is not an id"),
    "recipe list": (at("content", "recipe", value=[]), "content.recipe is not a table"),
    "recipe text": (
        at("content", "recipe", value={"a": "two words"}),
        "a text may not go into the header",
    ),
    "recipe path": (at("content", "recipe", value={"a": "/etc/passwd"}), "a file path may not go"),
    "recipe key": (at("content", "recipe", value={"two words": 1}), "must be a short token"),
    "recipe integer": (at("content", "recipe", value={"a": 2**53}), "an integer too large"),
    "no blocks": (at("content", "blocks", value={}), "content.blocks is not a table of blocks"),
    "blocks list": (at("content", "blocks", value=[1]), "content.blocks is not a table of blocks"),
    "block name": (at("content", "blocks", value={"../x": {}}), "not a name for a block"),
    "block fields": (block(extra=1), "content.blocks.layers has other keys"),
    "block kind list": (block(kind=["states"]), "unknown block kind"),
    "block spec list": (block(spec=[1]), "the spec of a block is a table"),
    "block dtype list": (block(dtype=["f2"]), "dtype of a block"),
    "block dtype upper": (block(dtype="F2"), "dtype of a block"),
    "block dtype object": (block(dtype="O"), "dtype of a block"),
    "block layers": (block(layers=7), "layers is not a list"),
    "block layers nested": (block(layers=[[1]]), "layers are distinct numbers"),
    "block layers true": (block(layers=[True, 2, 3]), "layers are distinct numbers"),
    "block layers twice": (block(layers=[1, 1, 2]), "layers are distinct numbers"),
    "block width": (block(width=True), "width of a block"),
    "block width huge": (block(width=1 << 40), "width of a block"),
    "block of texts with width": (
        at("content", "blocks", "answers", "width", value=4),
        "width of a block",
    ),
    "block added": (more_blocks, "content.datasets has other keys"),
    "dataset missing": (
        at("content", "datasets", "recipe", delete=True),
        "content.datasets has other keys",
    ),
    "dataset name": (rename, "content.datasets has other keys"),
    "dataset not table": (
        at("content", "datasets", "recipe", value=[1]),
        "dataset recipe is not a table",
    ),
    "dataset extra": (dataset("recipe", filters=[1]), "dataset recipe has other keys"),
    "dataset dtype": (
        dataset("layers__values", dtype="f4"),
        "dataset layers__values is not of type f2",
    ),
    "dataset dtype list": (dataset("layers__values", dtype=["f2"]), "is not of type f2"),
    "dataset digest": (dataset("recipe", sha256="AB" * 32), "dataset recipe has no digest"),
    "dataset rank": (dataset("recipe", shape=[1, 1]), "dataset recipe: another rank"),
    "dataset shape type": (dataset("recipe", shape={"0": 1}), "dataset recipe: another rank"),
    "dataset shape true": (dataset("recipe", shape=[True]), "a length that is none"),
    "dataset negative": (dataset("recipe", shape=[-1]), "a length that is none"),
    "dataset 2^60": (dataset("recipe", shape=[1 << 52]), "a length that is none"),
    "dataset bomb": (dataset("recipe", shape=[BIG]), "dataset recipe is outside the file"),
    "dataset width": (dataset("layers__values", shape=[12, 3, 6]), "another shape than its peers"),
    "dataset peers": (dataset("layers__keys", shape=[7, 32]), "another shape than its peers"),
    "dataset offsets": (dataset("layers__offsets", shape=[0]), "another shape than its peers"),
    "layout list": (at("layout", value=[1]), "layout is not a table"),
    "layout missing": (at("layout", "recipe", delete=True), "layout has other keys"),
    "layout text": (at("layout", "recipe", value="4096"), "dataset recipe has no offset"),
    "layout negative": (at("layout", "recipe", value=-64), "dataset recipe has no offset"),
    "layout zero": (at("layout", "recipe", value=0), "dataset recipe is outside the file"),
    "layout in header": (at("layout", "recipe", value=64), "dataset recipe is outside the file"),
    "layout odd": (at("layout", "recipe", value=lambda o: o + 1), "dataset recipe is not aligned"),
    "layout beyond": (at("layout", "recipe", value=1 << 50), "dataset recipe is outside the file"),
    "layout overlap": (overlap, "overlaps another"),
    "size": (at("size", value=lambda n: n + 1), "another size than when sealed"),
    "size type": (at("size", value="1"), "the size in the header is no size"),
    "user block": (at("userblock", value=12288), "the user block has an impossible size"),
    "user block small": (at("userblock", value=2048), "the user block has an impossible size"),
    "user block true": (at("userblock", value=True), "the user block has an impossible size"),
    "user block huge": (at("userblock", value=1 << 40), "the user block has an impossible size"),
}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_hostile_header_is_refused(make, sealed, name):
    edit, message = ATTACKS[name]
    userblock = make.body_of(sealed)["userblock"]
    make.reforge(sealed, lambda body: edit(body) or body)
    assert sealed.stat().st_size > userblock
    start = time.perf_counter()
    with pytest.raises(CacheFormatError, match=message):
        KnowledgeCache.open(sealed)
    assert time.perf_counter() - start < 5  # a bound against hanging, not a speed


def test_a_header_that_was_not_changed_is_accepted(make, sealed):
    make.reforge(sealed, lambda body: body)
    verify(sealed)


def test_a_block_with_the_id_of_another_is_refused(make, sealed):
    def edit(body):
        blocks = body["content"]["blocks"]
        blocks["layers"]["id"] = blocks["embedded"]["id"]

    make.reforge(sealed, edit, ids=False)
    with pytest.raises(CacheFormatError, match="block layers carries the id of another"):
        KnowledgeCache.open(sealed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.replace(b'"format":1', b'"format":1.0'),
            "holds the number 1.0, only integers",
        ),
        (lambda t: t.replace(b'"format":1', b'"format":NaN'), "holds the number NaN"),
        (lambda t: t.replace(b'"format":1', b'"format":-Infinity'), "holds the number -Infinity"),
        (lambda t: t.replace(b'"format":1', b'"format":' + b"9" * 5000), "an integer too large"),
        (lambda t: t.replace(b'"format":1', b'"format":1,"format":1'), "a key stands twice"),
        (lambda t: t.replace(b'"format":1', b'"format": 1'), "not in canonical form"),
        (lambda t: t.replace(b"toy", b"\\u0074oy"), "not in canonical form"),
        (lambda t: t.replace(b"toy", "tö".encode()), "not JSON in ASCII"),
        (lambda t: t.decode().encode("utf-16"), "not JSON in ASCII"),
        (lambda t: t + b" ", "not in canonical form"),
        (lambda t: t[:-1], "not JSON in ASCII"),
        (lambda t: b"[" * 3000, "not JSON in ASCII"),
        (lambda t: b"{}", "the header has other keys"),
        (lambda t: b"12", "the header is not a table"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(make, sealed, change, message):
    body = make.body_of(sealed)
    make.put_header(sealed, change(canonical_json(body)), body["userblock"])
    with pytest.raises(CacheFormatError, match=message):
        KnowledgeCache.open(sealed)


def test_a_header_of_a_hundred_thousand_datasets_is_refused_at_once(make, sealed):
    raw = bytearray(sealed.read_bytes())
    raw[8:16] = (1 << 24).to_bytes(8, "little")
    sealed.write_bytes(bytes(raw))
    with pytest.raises(
        CacheFormatError, match="the length of the header is impossible; found 16777216"
    ):
        KnowledgeCache.open(sealed)


def test_every_dataset_is_aligned(make, sealed):
    offsets = make.body_of(sealed)["layout"].values()
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


@pytest.mark.parametrize(
    "name", ["", "A", "a__b", "_a", "a_", "a-b", "classes", "recipe", "x" * 41, 3, "a/b"]
)
def test_names_for_blocks(name):
    from cache.errors import ValueRefusedError

    with pytest.raises(ValueRefusedError, match="not a name for a block"):
        check_block_name(name)
