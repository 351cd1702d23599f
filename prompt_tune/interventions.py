"""Conditional low-rank interventions on frozen hidden rows, and their projection to prompt tokens.

With h a row of width D, v the image feature and r the rank (CILMP, Du et al. 2025; its ancestor is
LoReFT, `h + R^T (W h + b - R h)`, Wu et al. 2024, eq. 2, in pyreft):

    m  = U2 (U1 v + b1) + b2                        two linear maps, no activation between
    h' = Dropout(h + R (W [h; m * h] + b - R^T h))  on the first and the last rows of a class
    t  = B (A h')                                   on every row, h' = h for those between

Computed without anything of width D per image. With z = U1 v + b1 and W = [W1 | W2],

    delta = W [h; m * h] + b - R^T h = k + K z,  k = (W1 + W2 diag(b2) - R^T) h + b,
                                                 K = W2 diag(h) U2
    A h'  = A h + (A R) delta

is affine in z, and k, K, A h, A R do not depend on the image. K is linear in h,

    K[o, i] = sum_d (W2[o, d] U2[d, i]) h[d],

so that one product of the rows with the tables of all stages gives every k and K. Dropout falls on
the D elements of h': training builds them, some stages of a group at a time (`row_dropout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prompt_tune.row_dropout import DroppedProjection
from prompt_tune.towers import Stage

BUILT = {"cpu": 2**22, "cuda": 2**29}
"""Bytes of intervened rows that dropout builds at a time; a CPU is faster inside its caches."""
KeptRows = tuple[Tensor | None, Tensor | None]
"""Keep-masks of the prefix and the suffix rows, `[classes, rows, batch, width]`."""


class Projection(nn.Module):
    """`t = B (A h)`: low-rank, without bias, scale or residual."""

    def __init__(self, source: int, width: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, source))
        self.B = nn.Parameter(torch.empty(width, rank))
        nn.init.uniform_(self.A, -(source**-0.5), source**-0.5)
        nn.init.uniform_(self.B, -(rank**-0.5), rank**-0.5)


class Intervention(nn.Module):
    """One conditional low-rank intervention, shared by the rows of a group and by all classes.

    `R` starts with orthonormal columns and, unlike in pyreft, is not kept so: the published code
    does not constrain it. The others start as `torch.nn.Linear` does.

    Args:
        source: width D of the hidden rows.
        rank: r.
        image_width: width of the image feature; None leaves the image out, and then `W` acts on
            h alone and U1, b1, U2, b2 do not exist.
        precision: of W, b, U1, b1, U2, b2 as parameters; the computation is in that of the rows.
    """

    def __init__(
        self,
        source: int,
        rank: int,
        image_width: int | None,
        *,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.conditional = image_width is not None
        self.R = nn.Parameter(torch.empty(source, rank))
        nn.init.orthogonal_(self.R)
        self.W, self.b = _linear(2 * source if self.conditional else source, rank, precision)
        if image_width is not None:
            self.U1, self.b1 = _linear(image_width, rank, precision)
            self.U2, self.b2 = _linear(rank, source, precision)


def _linear(inputs: int, outputs: int, precision: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    start = nn.Linear(inputs, outputs)
    return nn.Parameter(start.weight.data.to(precision)), nn.Parameter(
        start.bias.data.to(precision)
    )


@dataclass(frozen=True)
class Sizes:
    """Sizes of a prompt stage.

    Attributes:
        source: width of the hidden rows.
        text: width of the text tower.
        image: width of the image feature, or None for interventions that do not read it.
        context: number of context tokens.
        prefix: how many of a class's first rows are intervened.
        suffix: how many of its last rows.
        rank: of interventions and projection.
    """

    source: int
    text: int
    image: int | None
    context: int
    prefix: int
    suffix: int
    rank: int


class Rows(nn.Module):
    """The frozen hidden rows of all classes, apart by group; they follow the module's device.

    Args:
        values: per class, `[rows, width]`, at least `prefix + suffix` rows each.
        prefix: rows of the first group.
        suffix: rows of the last group.
    """

    prefix: Float[Tensor, "classes*prefix width"]
    suffix: Float[Tensor, "classes*suffix width"]
    middle: Float[Tensor, "rows width"]

    def __init__(self, values: tuple[Tensor, ...], prefix: int, suffix: int) -> None:
        super().__init__()
        self.classes = len(values)
        ends = [len(h) - suffix for h in values]
        for name, parts in (
            ("prefix", [h[:prefix] for h in values]),
            ("suffix", [h[n:] for h, n in zip(values, ends, strict=True)]),
            ("middle", [h[prefix:n] for h, n in zip(values, ends, strict=True)]),
        ):
            self.register_buffer(name, torch.cat(parts), persistent=False)


class PromptStage(nn.Module):
    """The prompt tokens at one block's input: context, and the class's rows where there are any.

    A stage has parameters of its own and shares them between all classes. Every stage starts again
    from the same frozen rows, not from the output of the stage before.
    """

    def __init__(
        self, sizes: Sizes, *, rows: bool = True, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.empty(sizes.context, sizes.text))
        nn.init.normal_(self.context, std=0.02)
        self.prefix = self.suffix = self.projection = None
        if rows:
            new = (sizes.source, sizes.rank, sizes.image)
            if sizes.prefix:
                self.prefix = Intervention(*new, precision=precision)
            if sizes.suffix:
                self.suffix = Intervention(*new, precision=precision)
            self.projection = Projection(sizes.source, sizes.text, sizes.rank)

    def forward(
        self,
        rows: Rows | None,
        v: Float[Tensor, "batch image"],
        *,
        dropout: float = 0.0,
        kept: KeptRows | None = None,
    ) -> Stage:
        """This stage alone; see `prompt_stages`."""
        return prompt_stages([self], rows, v, dropout=dropout, kept=kept and [kept])[0]


def prompt_stages(
    stages: Sequence[PromptStage],
    rows: Rows | None,
    v: Float[Tensor, "batch image"],
    *,
    dropout: float = 0.0,
    kept: Sequence[KeptRows] | None = None,
) -> list[Stage]:
    """The tokens of all stages, rows in coordinates; with dropout above 0 drawn for every image.

    Args:
        stages: of equal sizes.
        rows: the frozen rows, or None.
        v: normalised image features.
        dropout: the rate.
        kept: per stage, keep-masks of the prefix and suffix rows instead of drawn ones.
    """
    contexts = [s.context.to(v.dtype) for s in stages]
    projections = [s.projection for s in stages if s.projection is not None]
    if rows is None or not projections:
        return [Stage(context) for context in contexts]
    down = torch.stack([p.A for p in projections])
    low: dict[str, Sequence[Tensor | None]] = {}
    for i, name in enumerate(("prefix", "suffix")):
        group: list[Intervention] = [g for s in stages if (g := getattr(s, name)) is not None]
        h: Tensor = getattr(rows, name)
        low[name] = [None] * len(stages)
        if group:
            masks = None if kept is None else [pair[i] for pair in kept]
            found = (
                project_dropped(group, h, v, down, dropout, kept=masks)
                if dropout
                else project(group, h, v, down)
            )
            low[name] = [x.unflatten(0, (rows.classes, -1)).permute(2, 0, 1, 3) for x in found]
    middle = _mapped(rows.middle, down)
    bases = _stack([p.B for p in projections]).transpose(1, 2).unbind()
    return [
        Stage(context, prefix, suffix, between, basis=basis)
        for context, prefix, suffix, between, basis in zip(
            contexts, low["prefix"], low["suffix"], middle, bases, strict=True
        )
    ]


def changes(
    group: Sequence[Intervention],
    h: Float[Tensor, "rows width"],
    v: Float[Tensor, "batch image"],
    rotation: Float[Tensor, "stages width rank"],
) -> Float[Tensor, "stages rows #batch rank"]:
    """`delta = k + K z` of each stage, in the coordinates of its `R`; batch 1 unconditioned."""
    dtype, width, count = h.dtype, h.shape[1], len(group)

    def all_stages(name: str) -> Tensor:
        return _stack([getattr(one, name).to(dtype) for one in group])

    w, b, rotation = all_stages("W"), all_stages("b"), rotation.to(dtype).transpose(1, 2)
    if not group[0].conditional:
        return (_mapped(h, w - rotation) + b[:, None])[:, :, None]
    w1, w2 = w.split(width, dim=-1)
    fixed = w1 + w2 * all_stages("b2")[:, None] - rotation
    table = (w2[:, :, None] * all_stages("U2").transpose(1, 2)[:, None]).flatten(1, 2)
    rank = w.shape[1]
    k, turned = _mapped(h, torch.cat([fixed, table], dim=1)).split([rank, rank**2], dim=-1)
    u1, b1 = all_stages("U1").flatten(0, 1), all_stages("b1").flatten()
    z = F.linear(v, u1, b1).unflatten(1, (count, -1)).permute(1, 2, 0)
    moved = (turned.reshape(count, -1, rank) @ z).unflatten(1, (len(h), rank))
    return (k + b[:, None])[:, :, None] + moved.transpose(2, 3)


def project(
    group: Sequence[Intervention],
    h: Float[Tensor, "rows width"],
    v: Float[Tensor, "batch image"],
    down: Float[Tensor, "stages rank width"],
) -> Float[Tensor, "stages rows #batch rank"]:
    """`A h'` of each stage without dropout: nothing of the rows' width is built per image."""
    rotation = _stack([one.R for one in group])
    inner, delta = down @ rotation, changes(group, h, v, rotation)
    moved = (delta.flatten(1, 2) @ inner.transpose(1, 2)).view_as(delta)
    return _mapped(h, down)[:, :, None] + moved


def project_dropped(
    group: Sequence[Intervention],
    h: Float[Tensor, "rows width"],
    v: Float[Tensor, "batch image"],
    down: Float[Tensor, "stages rank width"],
    dropout: float,
    *,
    kept: Sequence[Tensor | None] | None = None,
) -> list[Float[Tensor, "rows batch rank"]]:
    """`A h'` with dropout on every element of h', for each stage, image, class and row anew.

    As many stages are taken at once, or rows of one, as `BUILT` allows. Without `kept`, the masks
    of each such block are drawn from a seed that torch's global generator gives: they depend on the
    sizes and the kind of device, not on the memory there is.
    """
    rotation = _stack([one.R for one in group])
    delta = changes(group, h, v, rotation).expand(-1, -1, len(v), -1)
    most = BUILT.get(h.device.type, 2**29) // (len(v) * h.shape[1] * h.element_size())
    some, own = max(1, most // len(h)), max(1, most)
    found: list[Tensor] = []
    tables = zip(
        *(_split(x, some, 0) for x in (delta, rotation, down / (1 - dropout))), strict=True
    )
    for k, (moves, turn, onto) in enumerate(tables):
        parts = []
        for i, (rows, move) in enumerate(zip(h.split(own), _split(moves, own, 1), strict=True)):
            mask: Tensor | int = int(torch.randint(2**62, ())) if kept is None else 0
            if kept is not None:
                given = [_given(one, h, v).split(own)[i] for one in kept[k * some : (k + 1) * some]]
                mask = torch.stack(given)
            args = rows, move.contiguous(), turn, onto, dropout, mask
            parts.append(DroppedProjection.apply(*args))
        found += (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).unbind()
    return found


def _split(x: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """`x` in pieces; itself where it is one."""
    return (x,) if x.shape[dim] <= size else x.split(size, dim=dim)


def _given(kept: Tensor | None, h: Tensor, v: Tensor) -> Bool[Tensor, "rows batch width"]:
    assert kept is not None  # noqa: S101 - masks are given for all stages that have rows
    return kept.reshape(len(h), len(v), -1)


def _stack(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters of all stages; their gradients are brought in order at once."""
    stacked = torch.stack(list(parameters))
    return stacked.flatten().view_as(stacked)


def _mapped(
    h: Float[Tensor, "rows width"], tables: Float[Tensor, "stages q width"]
) -> Float[Tensor, "stages rows q"]:
    """`table h` for the tables of all stages, in one product."""
    flat = h @ tables.flatten(0, 1).T
    return flat.unflatten(1, (len(tables), -1)).transpose(0, 1)
