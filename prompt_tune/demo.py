"""The demo: a list of the same commands a user types, read from a file."""

import shlex
from pathlib import Path

from cache.recipe import read_yaml

LISTS = Path(__file__).parent / "presets" / "demo"


def commands(out: Path, *, full: bool = False) -> list[tuple[str, list[str]]]:
    """The demo's commands as (line to show, arguments), with `{out}` filled in; makes `out`.

    The list is `presets/demo/short.yaml`, or `full.yaml` with all splits and published budgets.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = read_yaml(LISTS / ("full.yaml" if full else "short.yaml"))
    filled = [str(line).format(out=shlex.quote(str(out))) for line in lines]
    return [(line, shlex.split(line)) for line in filled]
