"""A walk through a foreign HDF5 file that allows a few things and refuses all others.

Runs in the child of `cache.foreign.sandbox` only. The order of checks matters: what could make the
library open another file, follow a link or fill memory is asked for before anything else, and the
numbers themselves are never read here: only where they lie.
"""

import math
import os
from itertools import pairwise
from typing import Any

import h5py
from h5py import h5d, h5l, h5o, h5s, h5t

from cache.errors import CacheFormatError
from cache.foreign.legacy_pickle import refuse

MOST_OBJECTS = 4096
MOST_ATTRIBUTES = 64  # not one is read
LONGEST_NAME = 200
TYPES = {
    "Half": h5t.IEEE_F16LE,
    "Float": h5t.IEEE_F32LE,
    "Double": h5t.IEEE_F64LE,
}
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError)
_REPACK = "Write it again with `h5repack -l CONTI -f NONE`."


def walk(fd: int) -> list[dict[str, Any]]:
    """Name, type, shape and place of every dataset of floats, at most one group deep.

    Raises:
        CacheFormatError: anything else in the file; what and where.
    """
    try:
        with open(fd, "rb", closefd=False) as raw, h5py.File(raw, "r") as file:
            found = _group(file.id, "", deep=False)
    except _FAULTS as error:
        what = f"the HDF5 library refuses it ({type(error).__name__})"
        raise CacheFormatError(what) from error
    if not found:
        refuse("the file holds no datasets")
    _check_spans(found, os.fstat(fd).st_size)
    return found


def _where(place: str, what: str, do: str | None = None) -> CacheFormatError:
    return CacheFormatError(what, where=ascii(place or "/"), do=do)


def _names(group: Any, place: str) -> list[bytes]:
    count = group.get_num_objs()
    if count > MOST_OBJECTS:
        what = f"{count} objects, at most {MOST_OBJECTS} are read"
        raise _where(place, what)
    return list(group)


def _group(group: Any, place: str, *, deep: bool) -> list[dict[str, Any]]:
    found = []
    for raw in _names(group, place):
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _where(place, "a name that is not UTF-8") from error
        at = f"{place}/{name[:LONGEST_NAME]}"
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise _where(at, "a name that is too long, or not printable")
        if group.links.get_info(raw).type != h5l.TYPE_HARD:
            raise _where(at, "a link to another place or file")
        if h5o.get_info(group, raw).rc != 1:
            raise _where(at, "an object with more than one name")
        one = h5o.open(group, raw)
        if h5py.h5a.get_num_attrs(one) > MOST_ATTRIBUTES:
            raise _where(at, f"more than {MOST_ATTRIBUTES} attributes")
        if isinstance(one, h5d.DatasetID):
            found.append(_dataset(one, name, at))
        elif isinstance(one, h5py.h5g.GroupID) and not deep:
            found += _group(one, at, deep=True)
        else:
            raise _where(at, "a group inside a group, or something that is no dataset")
    return found


def _dataset(one: Any, name: str, at: str) -> dict[str, Any]:
    how = one.get_create_plist()
    if how.get_layout() == h5d.VIRTUAL:
        raise _where(at, "a virtual dataset")
    if how.get_layout() != h5d.CONTIGUOUS:
        raise _where(at, "a dataset in chunks", _REPACK)
    if how.get_external_count() != 0:
        raise _where(at, "a dataset whose values lie in another file")
    if how.get_nfilters() != 0:
        raise _where(at, "a dataset with filters", _REPACK)
    kind = one.get_type()
    dtype = None
    if kind.get_class() == h5t.FLOAT and not kind.committed():
        dtype = next((label for label, known in TYPES.items() if kind.equal(known)), None)
    if dtype is None:
        raise _where(at, "values that are not little-endian floats of 16, 32 or 64 bits")
    space = one.get_space()
    shape = space.get_simple_extent_dims() if _is_simple(space) else ()
    if not 1 <= len(shape) <= 3 or 0 in shape:
        raise _where(at, f"an array of shape {list(shape)}")
    nbytes = math.prod(shape) * kind.get_size()
    first = one.get_offset()
    if one.get_storage_size() != nbytes or first is None:
        raise _where(at, "a dataset that is not stored whole")
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    place = {"dtype": dtype, "shape": shape, "strides": strides, "first": first, "nbytes": nbytes}
    return {"name": name, "place": place}


def _is_simple(space: Any) -> bool:
    return bool(space.get_simple_extent_type() == h5s.SIMPLE)


def _check_spans(found: list[dict[str, Any]], size: int) -> None:
    """Nothing, if no two datasets share a byte and all lie within the file."""
    spans = sorted(
        (one["place"]["first"], one["place"]["first"] + one["place"]["nbytes"], one["name"])
        for one in found
    )
    for (_, last, _), (first, _, name) in pairwise(spans):
        if first < last:
            raise _where(name, "values that overlap those of another dataset")
    if spans[-1][1] > size:
        raise _where(spans[-1][2], "values beyond the end of the file")
