"""A frozen image tower with optional learnable prompts in front of its blocks."""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache.errors import ModelError
from prompt_tune.execution import Execution
from prompt_tune.towers import live
from prompt_tune.towers.parts import Part, Stream

CLASS, REGISTERS, PATCHES, PROMPTS = "class", "registers", "patches", "prompts"
ZEROED = "zeroed"


class ImageTower(ABC):
    """What both kinds of image tower share.

    Not a module: whoever keeps a tower registers none of its frozen parameters. Pooling never
    reads a prompt: a tower that averages averages its patches.

    Args:
        module: the tower's module; frozen and put in eval mode.
        image_size: height and width of its input.
    """

    width: int
    embed_dim: int
    blocks: Sequence[live.Block]
    prefix: tuple[str, ...] = (CLASS,)
    reads: frozenset[str] = frozenset({CLASS})
    execution = Execution()
    zeroed = 0

    def __init__(self, module: nn.Module, image_size: int | Sequence[int]) -> None:
        frozen: Any = module.eval().requires_grad_(requires_grad=False)
        last = torch.channels_last  # the patch embedding is faster
        self.module: nn.Module = frozen.to(memory_format=last)
        size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        if len(set(size)) != 1:
            raise ModelError(
                "this backbone's images are not square",
                found=" x ".join(map(str, size)),
                wanted="one size for height and width",
            )
        self.image_size = int(size[0])

    def executing(self, execution: Execution) -> Self:
        """A tower of the same weights that runs as `execution` says."""
        own = self.own
        other = copy.copy(self)
        other.execution = execution
        other.blocks = live.compiled(own) if execution.compiled else own
        return other

    @functools.cached_property
    def own(self) -> Sequence[live.Block]:
        """The blocks as they are."""
        return self.blocks

    def zeroing(self, patches: int) -> Self:
        """A tower of the same weights whose first patches are zero vectors before every block.

        Their positions stay, as keys and values; pooling reads them no more than prompts.
        """
        other = copy.copy(self)
        other.zeroed = patches
        return other

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def encode(
        self,
        images: Float[Tensor, "batch 3 size size"],
        prompts: Sequence[Float[Tensor, "n width"]] | None = None,
    ) -> Float[Tensor, "batch embed"]:
        """Un-normalised embeddings of preprocessed images.

        Prompts stand after the patches. The first enter after the positional embedding and before
        the norm in front of block 0; those of index k overwrite them at the input of block k.
        Without prompts this is open_clip's `encode_image`.

        Raises:
            ModelError: there are prompts for more blocks than the tower has, or fewer patches than
                are zeroed.
        """
        prompts = [] if prompts is None else [p.to(self.dtype) for p in prompts]
        if len(prompts) > self.depth:
            raise ModelError(
                "the visual prompt depth does not fit the image tower",
                found=len(prompts),
                wanted=f"0 to {self.depth}",
                do="Lower method.visual_depth.",
            )
        with self.execution.autocast(self.device):
            return self._encode(images, prompts).to(self.dtype)

    def _encode(self, images: Tensor, prompts: Sequence[Tensor]) -> Float[Tensor, "batch embed"]:
        x = self._embed(images.to(self.dtype, memory_format=torch.channels_last))
        inputs = [Stream(x, self._parts(x.shape[1]))]
        replaced: list[list[Stream]] = [[] for _ in self.blocks]
        if self.zeroed:
            inputs = self._without_some(x)
            replaced = [inputs[1:] for _ in self.blocks]
        if prompts:
            part = _prompt_part(prompts, x.shape[1])
            inputs.append(Stream(self._norm_first(prompts[0])[None], (part,)))
            for k, prompt in enumerate(prompts[1:], start=1):
                replaced[k] = [*replaced[k], Stream(prompt[None], (part,))]
        recompute = self.execution.checkpoint_image
        outputs = live.run(
            self.blocks, inputs, replaced, read=self.reads, causal=False, recompute=recompute
        )
        order = [outputs[name][1] for name in (*self.prefix, PATCHES) if name in outputs]
        return self._pool(order[0] if len(order) == 1 else torch.cat(order, dim=1))

    def _without_some(self, x: Float[Tensor, "batch length width"]) -> list[Stream]:
        """The tower's own positions but for the first patches, and zeros at those."""
        *prefix, patches = self._parts(x.shape[1])
        first, last = patches.positions[0][0], patches.end
        behind = first + self.zeroed
        if behind >= last:
            raise ModelError(
                "the image tower has too few patches to zero so many",
                found=last - first,
                wanted=f"more than {self.zeroed}",
            )
        kept = Part(PATCHES, patches.rank, [range(behind, last)])
        zeros = Part(ZEROED, patches.rank, [range(first, behind)])
        rest = torch.cat([x[:, :first], x[:, behind:]], dim=1)
        return [
            Stream(rest, (*prefix, kept)),
            Stream(x.new_zeros(1, self.zeroed, x.shape[-1]), (zeros,)),
        ]

    def _parts(self, length: int) -> tuple[Part, ...]:
        patches = length - sum(self._prefix_sizes())
        sizes = {**dict(zip(self.prefix, self._prefix_sizes(), strict=True)), PATCHES: patches}
        parts, at = [], 0
        for rank, (name, size) in enumerate(sizes.items()):
            parts.append(Part(name, rank, [range(at, at + size)]))
            at += size
        return tuple(parts)

    def _prefix_sizes(self) -> tuple[int, ...]:
        return (1,)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Patches and what stands before them."""

    @abstractmethod
    def _embed(self, images: Tensor) -> Float[Tensor, "batch length width"]:
        """What enters block 0 without prompts."""

    @abstractmethod
    def _norm_first(self, prompts: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """The norm in front of block 0, or nothing."""

    @abstractmethod
    def _pool(self, x: Float[Tensor, "batch read width"]) -> Float[Tensor, "batch embed"]:
        """The embedding from the last block's output at the parts that pooling reads."""


def _prompt_part(prompts: Sequence[Tensor], first: int) -> Part:
    shapes = {tuple(p.shape) for p in prompts}
    if len(shapes) != 1:
        message = f"visual prompts of one run have one shape, not {sorted(shapes)}"
        raise ValueError(message)
    return Part(PROMPTS, 3, [range(first, first + prompts[0].shape[0])])
