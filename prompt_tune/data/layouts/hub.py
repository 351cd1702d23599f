"""Hugging Face `datasets`: a hub id, a folder written by `save_to_disk`, or a Parquet folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache.errors import DataError
from cache.registry import suggest
from prompt_tune.data.declaration import DataDeclaration
from prompt_tune.data.layout import Found, Layout, Part, saved_by_datasets

SAVED = ("dataset_dict.json", "dataset_info.json")


def _open(place: str, declaration: DataDeclaration) -> Any:
    import datasets
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    try:
        if any((Path(place) / name).is_file() for name in SAVED):
            return datasets.load_from_disk(place)
        return datasets.load_dataset(place, revision=declaration.revision)
    except GatedRepoError as error:
        do = "Accept its terms on its page and log in, or give a local path."
        what = "the data set is gated"
        raise DataError(what, where=place, do=do) from error
    except (OfflineModeIsEnabled, ConnectionError) as error:
        do = "Fetch it once while online, or give a local path."
        what = "the data set is not here and the hub is offline"
        raise DataError(what, where=place, do=do) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        what = f"the data set cannot be opened ({error.__class__.__name__}: {error})"
        if "gated" in str(error).lower():
            do = "Accept its terms on its page and log in, or give a local path."
        else:
            do = "Check the id or path."
        raise DataError(what[:300], where=place, do=do) from error


def _column(wanted: str | None, kinds: tuple[type, ...], usual: str, features: Any) -> str:
    """The declared column, else the only one of its kind, else the usual name."""
    if wanted is not None or usual in features:
        name = wanted or usual
    else:
        fitting = [name for name, feature in features.items() if isinstance(feature, kinds)]
        name = fitting[0] if len(fitting) == 1 else usual
    if name not in features:
        do = f"{suggest(name, features)} Declare `columns: {{{usual}: NAME}}`."
        what = f"no column {name!r}"
        raise DataError(what, do=do)
    return name


def _part(name: str, rows: Any, declaration: DataDeclaration, place: str) -> tuple[Part, Any]:
    import datasets

    columns, features = declaration.columns, rows.features
    try:
        image = _column(columns.image, (datasets.Image,), "image", features)
        label = _column(columns.label, (datasets.ClassLabel,), "label", features)
        patient = columns.patient and _column(columns.patient, (), "patient", features)
    except DataError as error:
        raise DataError(str(error), where=f"{place} [{name}]") from error
    feature = features[label]
    if not isinstance(features[image], datasets.Image):
        what = f"the column {image!r} holds no images"
        raise DataError(what, where=f"{place} [{name}]", found=features[image])
    values = rows.with_format(None).select_columns([label])[label][:]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if any(v is None or not isinstance(v, int | str) or v == -1 for v in values):
        what = f"the column {label!r} has rows without one label"
        raise DataError(what, where=f"{place} [{name}]", do="Take the unlabelled split out.")
    labels = tuple(names[v] if names and isinstance(v, int) else str(v) for v in values)
    who = rows.select_columns([patient])[patient][:] if patient else [None] * len(labels)
    pictures = rows.with_format(None).select_columns([image])
    if image != "image":
        pictures = pictures.rename_column(image, "image")
    if not features[image].decode:
        pictures = pictures.cast_column("image", datasets.Image())
    part = Part(
        rows=pictures,
        labels=labels,
        files=tuple(f"{place} [{name}] row {k}" for k in range(len(labels))),
        keys=tuple(f"{name}/{k}" for k in range(len(labels))),
        patients=tuple(None if p is None else str(p) for p in who),
    )
    return part, feature


def read(place: str, declaration: DataDeclaration) -> Found:
    """The images of a `datasets` data set.

    Raises:
        DataError: absent, gated, offline, without an image or a label column.
    """
    import datasets

    opened = _open(place, declaration)
    splits: Mapping[str, Any] = opened if isinstance(opened, dict) else {"": opened}
    parts, feature = {}, None
    for name, rows in splits.items():
        parts[name], feature = _part(name, rows, declaration, place)
    if set(parts) == {"train"}:  # what `load_dataset` calls data without splits
        parts = {"": next(iter(parts.values()))}
    if isinstance(feature, datasets.ClassLabel):
        return Found(parts, tuple((n, n.replace("_", " ")) for n in feature.names))
    labels = sorted({text for part in parts.values() for text in part.labels})
    numbered = all(text.isdecimal() for text in labels)
    names = () if numbered else tuple((text, text) for text in labels)
    return Found(parts, names, numbered=numbered)


LAYOUT = Layout(matches=saved_by_datasets, read=read)
