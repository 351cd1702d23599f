"""Splits for data that have none: seeded, stratified, whole patients, the same on every machine.

The order comes from SHA-256 of (seed, key), never from a random generator, so that a change of
library version or machine cannot change a split.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from cache.errors import DataError


def hashed(seed: int, key: str) -> str:
    """The sort key of `key` under `seed`."""
    return hashlib.sha256(f"{seed}\n{key}".encode()).hexdigest()


def divide(
    keys: Sequence[str],
    labels: Sequence[str],
    patients: Sequence[str | None],
    fractions: dict[str, float],
    *,
    seed: int,
    where: object,
) -> dict[str, list[int]]:
    """Indices of "train" and of each named fraction, ascending.

    A patient is one unit and counts for the class most of its images have. Every class keeps at
    least one unit in every split.

    Raises:
        DataError: a class with fewer units than splits.
    """
    units: dict[str, list[int]] = defaultdict(list)
    for index, (key, patient) in enumerate(zip(keys, patients, strict=True)):
        units[f"image {key}" if patient is None else f"patient {patient}"].append(index)
    strata: dict[str, list[str]] = defaultdict(list)
    for unit, members in units.items():
        votes = Counter(labels[i] for i in members)
        strata[min(votes, key=lambda label: (-votes[label], label))].append(unit)

    chosen: dict[str, list[int]] = {"train": [], **{name: [] for name in fractions}}
    for label, names in sorted(strata.items()):
        if len(names) <= len(fractions):
            what = f"the class {label!r} has too few images or patients to divide"
            wanted = f"at least {len(fractions) + 1}"
            do = "Add images, or give the data their own splits."
            raise DataError(what, where=where, found=len(names), wanted=wanted, do=do)
        queue = sorted(names, key=lambda unit: hashed(seed, unit))
        total = len(queue)
        spare = total - 1 - len(fractions)  # beyond the one unit every split keeps
        for name, fraction in fractions.items():
            take = min(max(round(fraction * total) - 1, 0), spare)
            spare -= take
            for unit in queue[: take + 1]:
                chosen[name] += units[unit]
            queue = queue[take + 1 :]
        for unit in queue:
            chosen["train"] += units[unit]
    return {name: sorted(indices) for name, indices in chosen.items()}
