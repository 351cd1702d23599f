"""Where the numbers of a tensor lie in a `.pth` file.

`torch.save` writes a zip of stored members: `data.pkl` says what the tensor looks like, `data/0`
holds its numbers. `read_tensor` runs in the child of `cache.foreign.sandbox`, `TensorPlace` is what
the parent makes of its answer.
"""

import codecs
import os
import re
import struct
import zipfile
from typing import Any

from cache.errors import CacheFormatError
from cache.foreign.legacy_pickle import ITEMSIZE, LARGEST_PICKLE, Machine, Tensor, refuse

MOST_MEMBERS = 16
READ_STEP = 1 << 20

_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch before 1.6 begins
_LOCAL = b"PK\x03\x04"
_KNOWN = re.compile(
    r"data\.pkl|data/[0-9]{1,4}|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id"
)
_FLAGS = 0x0808  # sizes after the data, names in UTF-8
_FAULTS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    ValueError,
    struct.error,
)

codecs.lookup("cp437")  # zipfile asks for it; in the child it cannot be opened later


def read_tensor(fd: int) -> dict[str, Any]:
    """Element type, shape, strides and place of the one tensor in a `.pth` file.

    Raises:
        CacheFormatError: anything that `torch.save(tensor, path)` does not write.
    """
    start = os.pread(fd, len(_OLD), 0)
    if start == _OLD:
        do = "Load it and save it again with torch 1.6 or later."
        refuse("the format that torch wrote before 1.6 is not read", do=do)
    if not start.startswith(_LOCAL):
        refuse("not a file that torch.save wrote", do="Name files of bare tensors.")
    try:
        with open(fd, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
            return _read(fd, archive)
    except _FAULTS as error:
        what = f"the zip archive is damaged ({type(error).__name__})"
        raise CacheFormatError(what) from error


def _read(fd: int, archive: zipfile.ZipFile) -> dict[str, Any]:
    members = _members(archive)
    starts = _starts(fd, archive)
    if "data.pkl" not in members:
        refuse("the archive holds no data.pkl")
    if "byteorder" in members and _content(archive, members["byteorder"], 16) != b"little":
        refuse("the numbers are not little-endian", do="Save the tensor on another machine.")
    tensor = Machine(_content(archive, members["data.pkl"], LARGEST_PICKLE)).run()
    own = f"data/{tensor.storage.key}"
    storages = [name for name in members if name.startswith("data/")]
    if storages != [own]:
        found = ", ".join(storages) or "none"
        refuse("the archive does not hold the one storage of its tensor", found=found)
    itemsize = ITEMSIZE[tensor.storage.dtype]
    if members[own].file_size != tensor.storage.count * itemsize:
        refuse("the storage has another size than its tensor says")
    span = _span(tensor)
    with archive.open(members[own]) as stream:  # to the end: zipfile compares its checksum there
        while stream.read(READ_STEP):
            pass
    return {
        "dtype": tensor.storage.dtype,
        "shape": tensor.shape,
        "strides": tensor.strides,
        "first": starts[members[own].filename] + tensor.offset * itemsize,
        "nbytes": span * itemsize,
    }


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by their name after the folder all of them share."""
    infos, members = archive.infolist(), {}
    if len(infos) > MOST_MEMBERS:
        refuse("the archive has more members than a bare tensor", found=len(infos))
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1 or roots & {"", ".", ".."}:
        refuse("the members of the archive do not share one folder")
    for info in infos:
        name = info.filename.partition("/")[2]
        known = _KNOWN.fullmatch(name) and info.orig_filename == info.filename
        if not known or name in members:
            what = "the archive has a member that a bare tensor does not, or twice"
            refuse(what, found=ascii(info.filename[:100]))
        stored = info.compress_type == zipfile.ZIP_STORED
        if not stored or info.compress_size != info.file_size or info.flag_bits & ~_FLAGS:
            refuse("a member of the archive is compressed or encrypted", found=ascii(name))
        members[name] = info
    return members


def _starts(fd: int, archive: zipfile.ZipFile) -> dict[str, int]:
    """Where the bytes of each member begin, after checking that none shares a byte."""
    starts, spans = {}, []
    for info in archive.infolist():
        at = info.header_offset
        header = os.pread(fd, 30, at) if at >= 0 else b""
        if len(header) != 30 or not header.startswith(_LOCAL):
            refuse("a member of the archive has no header")
        starts[info.filename] = at + 30 + sum(struct.unpack("<HH", header[26:]))
        spans.append((at, starts[info.filename] + info.file_size))
    spans.sort()
    ends = [*(first for first, _ in spans[1:]), archive.start_dir]
    if spans[0][0] != 0 or any(last > end for (_, last), end in zip(spans, ends, strict=True)):
        refuse("members of the archive overlap, or something precedes them")
    return starts


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, largest: int) -> bytes:
    if info.file_size > largest:
        refuse("a member of the archive is too large", found=f"{info.file_size} bytes")
    return archive.read(info)


def _span(tensor: Tensor) -> int:
    """How many elements of the storage the tensor reaches over, from its first on."""
    if 0 in tensor.shape:
        refuse("the tensor is empty", found=list(tensor.shape))
    reach = 0
    sides = [(s, n) for s, n in zip(tensor.strides, tensor.shape, strict=True) if n > 1]
    for stride, length in sorted(sides):
        if stride <= reach:
            refuse("elements of the tensor share their place", found=list(tensor.strides))
        reach += stride * (length - 1)
    if tensor.offset + reach >= tensor.storage.count:
        refuse("the tensor reaches beyond its storage")
    return reach + 1
