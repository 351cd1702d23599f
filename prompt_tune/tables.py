"""A grid of cells as text, Markdown, LaTeX or CSV."""

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

TableStyle = Literal["text", "markdown", "latex", "csv"]
STYLES: tuple[TableStyle, ...] = ("text", "markdown", "latex", "csv")
FILES: dict[str, TableStyle] = {"md": "markdown", "tex": "latex", "csv": "csv"}
"""The styles that are written to files, by suffix."""
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


def prose(text: str, style: TableStyle) -> str:
    """A line beside a table, escaped where the style is LaTeX."""
    return _escaped(text) if style == "latex" else text


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 image`, `2 images`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def csv_of(records: Sequence[Mapping[str, object]]) -> str:
    """Records of the same keys as CSV: numbers in full, nothing for None and NaN."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: "" if _missing(v) else v for k, v in record.items()})
    return text.getvalue().rstrip("\n")


def plain(value: Any) -> Any:
    """The same tables and lists with None for every NaN, as JSON has none."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if _missing(value) else value


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


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
        return rf"\textbf{{{_escaped(text)}}}" if strong else _escaped(text)

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
