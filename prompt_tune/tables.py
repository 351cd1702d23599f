"""A grid of cells as text, Markdown, LaTeX or CSV."""

import csv
import io
from collections.abc import Collection, Sequence
from typing import Literal

TableStyle = Literal["text", "markdown", "latex", "csv"]
STYLES: tuple[TableStyle, ...] = ("text", "markdown", "latex", "csv")
_LATEX = {"\\": r"\textbackslash{}", "–": "--", "±": r"$\pm$", "~": r"\textasciitilde{}"}
_LATEX |= {c: "\\" + c for c in "&%$#_{}"} | {"^": r"\textasciicircum{}"}


def laid_out(
    cells: Sequence[Sequence[str]],
    style: TableStyle = "text",
    *,
    left: Collection[int] = (0,),
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """The grid in a style, its first row as the head.

    Args:
        cells: rows of equally many texts.
        style: `latex` is a `tabular` of the booktabs package.
        left: columns that are aligned to the left; the others to the right.
        bold: (row, column) of cells set bold; plain text marks them with `*`, CSV not at all.
    """
    if style == "csv":
        return _csv(cells)
    if style == "markdown":
        return _markdown(cells, left, bold)
    if style == "latex":
        return _latex(cells, left, bold)
    starred = [
        [text + "*" * ((r, c) in bold) for c, text in enumerate(row)] for r, row in enumerate(cells)
    ]
    return _plain(starred, left)


def _plain(cells: Sequence[Sequence[str]], left: Collection[int]) -> str:
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]

    def padded(row: Sequence[str]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        texts = [text.ljust(w) if k in left else text.rjust(w) for k, (text, w) in pairs]
        return "  ".join(texts).rstrip()

    ruler = "  ".join("-" * width for width in widths)
    return "\n".join([padded(cells[0]), ruler, *map(padded, cells[1:])])


def _markdown(
    cells: Sequence[Sequence[str]], left: Collection[int], bold: Collection[tuple[int, int]]
) -> str:
    def shown(text: str, *, strong: bool) -> str:
        plain = " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
        return f"**{plain}**" if strong else plain

    lines = [
        [shown(text, strong=(r, c) in bold) for c, text in enumerate(row)]
        for r, row in enumerate(cells)
    ]
    rule = ["---" if k in left else "---:" for k in range(len(cells[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _latex(
    cells: Sequence[Sequence[str]], left: Collection[int], bold: Collection[tuple[int, int]]
) -> str:
    def shown(text: str, *, strong: bool) -> str:
        plain = "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
        return rf"\textbf{{{plain}}}" if strong else plain

    def line(r: int) -> str:
        row = [shown(text, strong=(r, c) in bold) for c, text in enumerate(cells[r])]
        return " & ".join(row) + r" \\"

    columns = "".join("l" if k in left else "r" for k in range(len(cells[0])))
    body = [line(r) for r in range(1, len(cells))]
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", line(0), r"\midrule", *body, r"\bottomrule", end])


def _csv(cells: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue().rstrip("\n")
