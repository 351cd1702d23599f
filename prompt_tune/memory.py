"""What a step keeps for its backward, predicted, and how it runs so that this fits.

Per token and block a frozen tower keeps the inputs of its two norms (width w each, always in the
precision of the weights), query, key, value and output of the attention, and the hidden layer of
the MLP (m). What weights of the method itself keep, does not grow with images times classes; nor do
frozen linear maps keep their input.

Predicted is what lives until the backward, not what lives within one operation: a budget leaves
room for that.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prompt_tune.execution import Execution, Precision
from prompt_tune.towers.attention import FEW


@dataclass(frozen=True)
class Tower:
    """Sizes of a frozen transformer.

    Attributes:
        width: w.
        hidden: of the MLP, m.
        heads: of the attention.
        depth: number of blocks.
        itemsize: bytes of a weight.
        on_cpu: where it runs.
    """

    width: int
    hidden: int
    heads: int
    depth: int
    itemsize: int = 4
    on_cpu: bool = False

    def product(self, precision: Precision) -> int:
        """Bytes of an element of a matrix product's result."""
        return 2 if precision == "bf16" else self.itemsize

    def attended(self, precision: Precision, queries: int) -> int:
        """Bytes of an element of query, key and value in fused attention of a class or image."""
        return 4 if self.on_cpu and queries <= FEW else self.product(precision)

    def weights(self, precision: Precision) -> int:
        """Bytes of the weights of one block in another precision than they are stored in."""
        matrices = 4 * self.width**2 + 2 * self.width * self.hidden
        return 2 * matrices if precision == "bf16" else 0


@dataclass(frozen=True)
class ImageStep:
    """The image side of a step.

    Attributes:
        batch: images.
        tokens: patches and class token.
        prompts: learnable tokens.
        stages: blocks that get prompts of their own; with 0 nothing is kept.
    """

    tower: Tower
    batch: int
    tokens: int
    prompts: int
    stages: int

    def blocks(self, precision: Precision) -> list[int]:
        """Bytes kept by each block."""
        tower, item = self.tower, self.tower.product(precision)
        found = []
        for k in range(tower.depth if self.stages else 0):
            keys = self.tokens + self.prompts
            entering = self.tokens if k < self.stages else keys
            if k == tower.depth - 1:  # keys and values of all, everything else of what is read
                dense = 2 * keys * item + (entering if k else 0) * tower.itemsize
                found.append(self.batch * tower.width * dense)
            else:
                out = self.tokens if k < self.stages - 1 else keys
                wide = (out + (entering if k else 0)) * tower.itemsize
                attention = 2 * (out + keys) * tower.attended(precision, out)
                own = tower.width * (wide + attention) + out * tower.hidden * item
                found.append(self.batch * own)
        return found

    def kept(self, precision: Precision, *, checkpoint: bool = False) -> int:
        """Bytes kept until the backward; with `checkpoint` every block's input, and one block."""
        blocks = self.blocks(precision)
        casts = self.tower.weights(precision) * len(blocks)
        if not checkpoint or not blocks:
            return sum(blocks) + casts
        inputs = self.batch * (self.tokens + self.prompts) * self.tower.width * self.tower.itemsize
        return (self.tower.depth - 1) * inputs + max(blocks) + casts // len(blocks)


@dataclass(frozen=True)
class TextStep:
    """The text side of a step.

    Attributes:
        batch: images that prompts are made for; 1 where they do not depend on the image.
        names: per class, tokens that are always computed: its name and the end token, and with
            BERT the start token.
        rows: per class, its rows.
        context: learnable tokens.
        stages: blocks that get prompts of their own.
        causal: or every token sees every other.
        pooled: tokens of a class that are read; None is all.
        rank: of the rows' coordinates; 0 without rows.
        source: width of the language model.
        groups: of intervened rows.
        conditional: whether interventions read the image.
    """

    tower: Tower
    batch: int
    names: tuple[int, ...]
    rows: tuple[int, ...]
    context: int
    stages: int
    causal: bool = True
    pooled: int | None = 1
    rank: int = 0
    source: int = 0
    groups: int = 0
    conditional: bool = False

    def some(self, size: int) -> "TextStep":
        """The most expensive `size` classes that stand together."""
        spans = [slice(i, i + size) for i in range(0, len(self.names), size)]
        full = [
            sum(self.names[s]) + sum(self.rows[s]) + len(self.names[s]) * max(self.names[s])
            for s in spans
        ]
        best = spans[full.index(max(full))]
        return replace(self, names=self.names[best], rows=self.rows[best])

    def made(self) -> int:
        """Bytes that making the prompts of all classes keeps: tables and coordinates."""
        if not self.rank:
            return 0
        table = self.stages * self.source * self.rank * 4
        own = 4 if self.conditional else 1
        rows = self.batch * sum(self.rows) * self.stages * (3 * self.rank + 3) * 4
        return table * (1 + self.groups * own) + rows

    def blocks(self, precision: Precision) -> int:
        """Bytes that the text transformer keeps."""
        return sum(self._block(k, precision) for k in range(self.tower.depth))

    def _block(self, k: int, precision: Precision) -> int:
        tower, item = self.tower, self.tower.product(precision)
        classes, last = len(self.names), k == tower.depth - 1
        carried = 0 if self.causal else self.context  # contexts of a causal tower see no class
        every = tuple(n + r + carried for n, r in zip(self.names, self.rows, strict=True))
        entering = every if k >= self.stages else self.names
        leaving = every if k >= self.stages - 1 else self.names
        if last and self.pooled is not None:
            leaving = (self.pooled,) * classes
        queries = classes * max(leaving)
        keys = classes * (max(every) + 1 + self.context - carried)
        few = 3 * max(leaving) < 2 * tower.width // tower.heads
        if few:  # scored part by part
            own = classes * max(entering)
            attention = tower.width * (2 * queries + 2 * own)
            scores = keys // classes + self.context + 1 + (self.rank + 1 if self.rank else 0)
            attention += queries * tower.heads * scores
            attention *= item
        else:
            attention = 2 * tower.width * (queries + keys)
            attention *= tower.attended(precision, max(leaving))
        wide = sum(leaving) + (sum(entering) if self.causal and k else 0)
        if not self.causal:
            wide += sum(leaving)
        own = tower.width * wide * tower.itemsize + sum(leaving) * tower.hidden * item
        # Keys and values of what all images share: context, basis, and rows where they are placed.
        shared = self.context + 1 + (self.rank + 1 if self.rank else 0)
        shared += sum(self.rows) if self.rank and not k else 0
        fixed = 2 * tower.width * shared * item + tower.weights(precision)
        return self.batch * (own + attention) + fixed

    def kept(self, precision: Precision, *, classes: int | None = None) -> int:
        """Bytes kept until the backward, with at most so many classes at a time."""
        some = self if classes is None else self.some(classes)
        return self.made() + some.blocks(precision)


@dataclass(frozen=True)
class Plan:
    """How a step runs, and what it keeps.

    Attributes:
        execution: of the towers.
        needed: bytes predicted when nothing is computed again.
        kept: bytes predicted for `execution`.
        budget: bytes that were allowed.
    """

    execution: Execution
    needed: int
    kept: int
    budget: int

    def describe(self) -> str:
        """One line."""
        chosen = []
        if self.execution.class_chunk is not None:
            chosen.append(f"{self.execution.class_chunk} classes at a time")
        if self.execution.checkpoint_image:
            chosen.append("image blocks computed again")
        line = f"memory: a step keeps {_gb(self.needed)}, {_gb(self.budget)} may be used"
        if chosen:
            line += f"; {' and '.join(chosen)}: {_gb(self.kept)}"
        return line + (", which may be too much" if self.kept > self.budget else "")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def plan(
    images: Sequence[ImageStep], texts: Sequence[TextStep], execution: Execution, budget: int
) -> Plan:
    """The first way to run a step that fits: as it is, then class chunks, then image checkpoints.

    Where nothing fits it is the one that keeps least.
    """
    precision = execution.precision
    sizes: list[int | None] = [None]
    classes = max((len(text.names) for text in texts), default=1)
    while classes > 1:
        classes = -(-classes // 2)
        sizes.append(classes)
    ways = []
    for checkpoint in (False, True) if images else (False,):
        of_images = sum(image.kept(precision, checkpoint=checkpoint) for image in images)
        for size in sizes:
            of_texts = sum(text.kept(precision, classes=size) for text in texts)
            chosen = replace(execution, class_chunk=size, checkpoint_image=checkpoint)
            ways.append((chosen, of_images + of_texts))
    fitting = [way for way in ways if way[1] <= budget] or [min(ways, key=lambda way: way[1])]
    return Plan(fitting[0][0], ways[0][1], fitting[0][1], budget)


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that a step may use: that of the GPU, or of the machine and the process's groups.

    Args:
        device: where steps run.
        root: of the file system that tells.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return max(min([_of_machine(root), *_of_groups(root)]), 0)


def _of_machine(root: Path) -> int:
    found = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if found is not None:  # what the kernel can free counts as free
        return found * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group of the process, and each above it, has left of its limit.

    File pages that were not used for a while count as free: the kernel takes them first.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            mount, names = root / "sys/fs/cgroup", GROUP_FILES
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                mount, names = mount / "memory", OLD_GROUP_FILES
            own = mount / path.lstrip("/")  # in a container the mount itself is the process's group
            for folder in dict.fromkeys([own, *own.parents, mount]):
                if folder.is_relative_to(mount):
                    yield from _left(folder, *names)


GROUP_FILES = "memory.max", "memory.current", "inactive_file"
OLD_GROUP_FILES = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def _left(folder: Path, limit: str, used: str, idle: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # no such group here, or `max`
        most, now = (int((folder / n).read_text(encoding="ascii")) for n in (limit, used))
        yield most - now + _numbers(folder / "memory.stat").get(idle, 0)


def _numbers(table: Path) -> dict[str, int]:
    """The first number behind each name."""
    try:
        rows = [line.split() for line in table.read_text(encoding="ascii").splitlines()]
    except FileNotFoundError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
