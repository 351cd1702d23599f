"""Joins the labels that files use to the classes of a declaration."""

from cache.errors import DataError
from prompt_tune.data.declaration import DataDeclaration, DeclaredClass, slug
from prompt_tune.data.images import DataClass
from prompt_tune.data.layout import Found


def class_table(
    found: Found, declaration: DataDeclaration, place: str
) -> tuple[tuple[DataClass, ...], dict[str, int]]:
    """The classes in label order, and the label of every name the files may use.

    Raises:
        DataError: fewer than two classes, or names that cannot be told apart.
    """
    declared = declaration.classes or _inferred(found, place)
    classes = tuple(DataClass(c.id, c.name, c.modality or declaration.modality) for c in declared)
    if len(classes) < 2:
        what = "there is nothing to tell apart"
        raise DataError(what, where=place, found=f"{len(classes)} class", wanted="at least 2")
    numbers: dict[str, int] = {}
    for k, c in enumerate(declared):
        if c.label is not None:
            names = [str(c.label)]
        else:
            names = [str(k)] if found.numbered else [c.id, c.name]
        for name in names:
            if numbers.setdefault(name, k) != k:
                what = f"two classes answer to the label {name!r}"
                raise DataError(what, where=place, do="Give them different `label`s.")
    if not found.numbered:
        for label, k in _alike(found, declared).items():
            numbers.setdefault(label, k)
    return classes, numbers


def renumbered(
    found: Found, classes: tuple[DataClass, ...], numbers: dict[str, int]
) -> tuple[str, ...]:
    """A note, if files that number the classes do it in another order than the declaration."""
    theirs = [numbers[label] for label, _ in found.names if label in numbers]
    if not found.ordered or theirs == sorted(theirs):
        return ()
    listed = ", ".join(classes[k].id for k in theirs)
    note = f"the files number the classes otherwise: {listed}; classes are joined by name, and "
    return (note + "label order, with base and novel classes, is that of the declaration",)


def _alike(found: Found, declared: tuple[DeclaredClass, ...]) -> dict[str, int]:
    """Labels that are one class's id or name but for case, `_` and the like: `Basal_cell`."""
    known: dict[str, set[int]] = {}
    for k, c in enumerate(declared):
        for told in (c.id, c.name) if c.label is None else ():
            known.setdefault(slug(told), set()).add(k)
    fitting = ((label, known.get(slug(label), set())) for label, _ in found.names)
    return {label: min(ks) for label, ks in fitting if len(ks) == 1}


def _inferred(found: Found, place: str) -> tuple[DeclaredClass, ...]:
    if not found.names:
        what = "the data do not say what their classes are called"
        do = "Write a declaration with `classes` in label order."
        raise DataError(what, where=place, do=do)
    seen: dict[str, str] = {}
    declared = []
    for label, name in found.names:
        id_ = slug(name)
        if not id_ or id_ in seen:
            what = f"no class id can be made of {label!r}"
            found_ = f"the same id as {seen[id_]!r}" if id_ else "no letter or digit of ASCII"
            do = "Write a declaration with `classes`."
            raise DataError(what, where=place, found=found_, do=do)
        seen[id_] = label
        declared.append(DeclaredClass(id=id_, name=name, label=label))
    return tuple(declared)
