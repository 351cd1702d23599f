"""The prompt tokens of every stage: context, and the rows of each class, intervened on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prompt_tune.class_side import ClassSide
from prompt_tune.interventions import (
    Fixed,
    Intervention,
    Projection,
    mapped,
    project_dropped,
    stacked,
)
from prompt_tune.towers import Stage

KeptRows = tuple[Tensor | None, Tensor | None]
"""Keep-masks of the prefix and the suffix rows, `[classes, rows, batch, width]`."""


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
    class_side: ClassSide | None = None,
) -> list[Stage]:
    """The tokens of all stages, rows in coordinates; with dropout above 0 drawn for every image.

    Args:
        stages: of equal sizes.
        rows: the frozen rows, or None.
        v: normalised image features.
        dropout: the rate.
        kept: per stage, keep-masks of the prefix and suffix rows instead of drawn ones.
        class_side: may remember what does not depend on the image.
    """
    once = class_side or ClassSide()
    contexts = [s.context.to(v.dtype) for s in stages]
    projections = [s.projection for s in stages if s.projection is not None]
    if rows is None or not projections:
        return [Stage(context) for context in contexts]
    down = once("down", lambda: torch.stack([p.A for p in projections]))
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
                else once(name, partial(Fixed.of, group, h, down)).rows(v)
            )
            low[name] = [x.unflatten(0, (rows.classes, -1)).permute(2, 0, 1, 3) for x in found]
    middle = once("middle", lambda: mapped(rows.middle, down))
    bases = once("bases", lambda: stacked([p.B for p in projections]).transpose(1, 2).unbind())
    return [
        Stage(context, prefix, suffix, between, basis=basis)
        for context, prefix, suffix, between, basis in zip(
            contexts, low["prefix"], low["suffix"], middle, bases, strict=True
        )
    ]
