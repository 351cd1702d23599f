"""How two sealed caches differ: recipes by field, entries by key, arrays by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache.blocks import KINDS, BlockSpec
from cache.combining.gathering import OpenBlock, Row
from cache.combining.joining import classes_of, recipes_of
from cache.combining.layerwise import LayerDifference, LayerSums
from cache.inspect import safe_text, verify
from cache.recipe import canonical_json, digest_of
from cache.store import KnowledgeCache

SHOWN = 10  # of a list, in `describe`


@dataclass(frozen=True)
class Change:
    """A field that two caches hold differently; `only` says which one has it, if one has not."""

    at: str
    a: Any = None
    b: Any = None
    only: str | None = None

    def describe(self) -> str:
        """One line."""
        if self.only is not None:
            return f"{safe_text(self.at)}: only in {self.only}: {_short(getattr(self, self.only))}"
        return f"{safe_text(self.at)}: {_short(self.a)} in a, {_short(self.b)} in b"


def _short(value: object) -> str:
    return safe_text(canonical_json(value).decode("ascii"))


@dataclass(frozen=True)
class BlockDifference:
    """A block that both caches have.

    Attributes:
        spec: fields of the specification that differ.
        only_a: places `class/item` of entries only the first cache has.
        only_b: places of entries only the second has.
        equal: how many entries have the same key and digest.
        different: places of entries that differ in key or digest.
        texts: of those, `class/item/column` of the texts and numbers that differ.
        uncomparable: of those, places whose arrays have other shapes.
        layers: differences of the arrays; none if all are equal.
    """

    spec: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    equal: int
    different: tuple[str, ...]
    texts: tuple[str, ...] = ()
    uncomparable: tuple[str, ...] = ()
    layers: tuple[LayerDifference, ...] = ()

    @property
    def same(self) -> bool:
        """True if specification and entries are equal."""
        return not (self.spec or self.only_a or self.only_b or self.different)

    def within(self, rtol: float) -> bool:
        """True if nothing differs but arrays, in every layer by at most `rtol` of `largest`."""
        if self.spec or self.only_a or self.only_b or self.texts or self.uncomparable:
            return False
        return all(one.max_abs <= rtol * one.largest for one in self.layers)

    def lines(self) -> Iterator[str]:
        """The differences as lines for a terminal."""
        yield from (change.describe() for change in self.spec)
        lists = {"only in a": self.only_a, "only in b": self.only_b}
        lists |= {"texts that differ": self.texts, "arrays of other shapes": self.uncomparable}
        yield f"{self.equal} entries equal, {len(self.different)} different"
        for name, places in lists.items():
            if places:
                more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
                yield f"{name}: {', '.join(places[:SHOWN])}{more}"
        if self.layers:
            heads = f"{'layer':>5}  {'max abs':>10}  {'mean abs':>10}"
            yield f"{heads}  {'cosine mean':>11}  {'cosine min':>10}"
        for one in self.layers:
            name = "-" if one.layer is None else str(one.layer)
            numbers = f"{one.max_abs:10.4g}  {one.mean_abs:10.4g}"
            yield f"{name:>5}  {numbers}  {one.cosine_mean:11.6f}  {one.cosine_min:10.6f}"


@dataclass(frozen=True)
class Difference:
    """How two caches differ; everything is empty if they are the same.

    Attributes:
        a: content id of the first.
        b: content id of the second.
        fields: of recipe, provenance, data set and class table.
        blocks_a: blocks only the first has.
        blocks_b: blocks only the second has.
        blocks: blocks both have.
        rtol: the tolerance that was asked for.
    """

    a: str
    b: str
    fields: tuple[Change, ...]
    blocks_a: tuple[str, ...]
    blocks_b: tuple[str, ...]
    blocks: Mapping[str, BlockDifference] = field(default_factory=dict)
    rtol: float | None = None

    @property
    def same(self) -> bool:
        """True if the content ids are equal."""
        return self.a == self.b

    def within(self, rtol: float) -> bool:
        """True if both hold the same entries and texts, and arrays within `rtol` of the largest.

        Recipes and provenance may differ; classes and blocks may not.
        """
        fixed = any(change.at.startswith(("dataset", "class table")) for change in self.fields)
        if fixed or self.blocks_a or self.blocks_b:
            return False
        return all(block.within(rtol) for block in self.blocks.values())

    def to_json(self) -> dict[str, Any]:
        """The difference as plain data."""
        within = None if self.rtol is None else self.within(self.rtol)
        return {**asdict(self), "same": self.same, "within": within}

    def describe(self) -> str:
        """The difference as lines for a terminal."""
        if self.same:
            return f"the same content  {self.a}"
        lines = [f"a  {self.a}", f"b  {self.b}", *(one.describe() for one in self.fields)]
        lines += [f"block {name}: only in a" for name in self.blocks_a]
        lines += [f"block {name}: only in b" for name in self.blocks_b]
        for name, block in self.blocks.items():
            state = [f"block {name}: the same"] if block.same else [f"block {name}"]
            lines += state + ([] if block.same else [f"  {line}" for line in block.lines()])
        if self.rtol is not None:
            verb = "is" if self.within(self.rtol) else "is not"
            lines.append(f"the content {verb} within a relative tolerance of {self.rtol:g}")
        return "\n".join(lines)


def diff(a: Path, b: Path, rtol: float | None = None) -> Difference:
    """How two caches differ.

    Both are verified in full first. Arrays are read one entry at a time.

    Args:
        a: the first cache.
        b: the second.
        rtol: a tolerance for arrays, reported with the result; see `Difference.within`.

    Raises:
        CacheFormatError: a file that is missing, foreign or damaged.
    """
    ids = verify(a).content_id, verify(b).content_id
    with (
        KnowledgeCache.open(a, expect=ids[0]) as one,
        KnowledgeCache.open(b, expect=ids[1]) as two,
    ):
        common = sorted(set(one.blocks) & set(two.blocks))
        same = one.content_id == two.content_id
        return Difference(
            a=one.content_id,
            b=two.content_id,
            fields=() if same else tuple(_changes(_facts(one), _facts(two), "")),
            blocks_a=tuple(sorted(set(one.blocks) - set(two.blocks))),
            blocks_b=tuple(sorted(set(two.blocks) - set(one.blocks))),
            blocks={name: _block(OpenBlock(one, name), OpenBlock(two, name)) for name in common},
            rtol=rtol,
        )


def _facts(found: KnowledgeCache) -> dict[str, Any]:
    """Everything but the blocks; classes by id, so that no order shifts a comparison."""
    recipes = [_by_id(recipe) for recipe in recipes_of(found.recipe)]
    merged = {f"merged {digest_of(recipe)[:12]}": recipe for recipe in recipes}
    table = {record.id: asdict(record) for record in found.classes}
    recipe = recipes[0] if len(recipes) == 1 else merged
    facts = {"dataset": found.dataset, "class table": table}
    return {**facts, "recipe": recipe, "provenance": found.provenance}


def _by_id(recipe: Mapping[str, Any]) -> dict[str, Any]:
    listed = classes_of(recipe)
    return dict(recipe) if listed is None else {**recipe, "classes": listed}


def _changes(a: Any, b: Any, at: str) -> Iterator[Change]:
    """Every leaf in which two pieces of plain data differ."""
    if isinstance(a, list) and isinstance(b, list):
        one, two = ({f"[{n}]": value for n, value in enumerate(v)} for v in (a, b))
        yield from _changes(one, two, at)
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            place = f"{at}{'' if not at or key.startswith('[') else '.'}{key}"
            if key in a and key in b:
                yield from _changes(a[key], b[key], place)
            elif key in a:
                yield Change(place, a=a[key], only="a")
            else:
                yield Change(place, b=b[key], only="b")
    elif type(a) is not type(b) or a != b:
        yield Change(at, a, b)


def _places(block: OpenBlock) -> dict[tuple[str, int], Row]:
    return {(row.class_id, row.item): row for row in block.rows()}


def _named(places: Any) -> tuple[str, ...]:
    return tuple(f"{class_id}/{item}" for class_id, item in sorted(places))


def _block(a: OpenBlock, b: OpenBlock) -> BlockDifference:
    spec = tuple(_changes(a.table.spec.plain(), b.table.spec.plain(), ""))
    one, two = _places(a), _places(b)
    common = sorted(set(one) & set(two))
    pairs = [(one[place], two[place]) for place in common]
    # The key also holds the specification: if that differs it is said once, not for every entry.
    different = [
        (x, y)
        for x, y in pairs
        if x.digest != y.digest or x.source != y.source or (not spec and x.key != y.key)
    ]
    found = BlockDifference(
        spec=spec,
        only_a=_named(set(one) - set(two)),
        only_b=_named(set(two) - set(one)),
        equal=len(pairs) - len(different),
        different=_named((x.class_id, x.item) for x, _ in different),
    )
    return replace(found, **_values(a, b, pairs, different)) if different else found


def _values(
    a: OpenBlock, b: OpenBlock, pairs: list[tuple[Row, Row]], different: list[tuple[Row, Row]]
) -> dict[str, Any]:
    one, two = a.table.spec, b.table.spec
    if one.kind != two.kind or one.width != two.width:
        return {"uncomparable": _named((x.class_id, x.item) for x, _ in different)}
    if one.dtype is None:
        return {"texts": tuple(_texts(different))}
    layers: list[int | None] = [layer for layer in one.layers if layer in two.layers]
    sums = [LayerSums(layer) for layer in (layers if one.layers else [None])]
    uncomparable = []
    for x, y in pairs:
        if a.length(x.number) != b.length(y.number):
            uncomparable.append((x.class_id, x.item))
            continue
        left, right = x.values()["values"], y.values()["values"]
        for each in sums:
            each.add(_layer(left, one, each.layer), _layer(right, two, each.layer))
    measured = tuple(each.result() for each in sums if each.rows)
    return {"uncomparable": _named(uncomparable), "layers": measured}


def _texts(different: list[tuple[Row, Row]]) -> Iterator[str]:
    for x, y in different:
        left, right = x.values(), y.values()
        columns = KINDS[x.block.table.spec.kind].columns
        yield from (f"{x.class_id}/{x.item}/{c}" for c in columns if left[c] != right[c])


def _layer(values: Any, spec: BlockSpec, layer: int | None) -> np.ndarray:
    picked = values if layer is None else values[:, spec.layers.index(layer)]
    return np.asarray(picked, np.float64)
