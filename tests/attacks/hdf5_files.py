"""Hostile HDF5 files.

Each attack is planted twice where that makes sense: in a plain HDF5 file, and in the HDF5 part of a
sealed cache whose header is then given the right digests. `victim` is a file that none may open.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forge
import h5py
import numpy as np
from h5py import h5d, h5f, h5p, h5s, h5t

TARGET = "layers__values"  # what a reader of a cache would ask for
Plant = Callable[[h5py.File, Path], None]
Patch = Callable[[Path, Path], None]
PLANTS: dict[str, Plant] = {}
PATCHES: dict[str, Patch] = {}


def plant(make_it: Plant) -> Plant:
    """Registers an attack that an open HDF5 file can hold."""
    PLANTS[make_it.__name__] = make_it
    return make_it


def patch(make_it: Patch) -> Patch:
    """Registers an attack that changes the bytes of a finished HDF5 file."""
    PATCHES[make_it.__name__] = make_it
    return make_it


def freed(file: h5py.File) -> str:
    """The name a reader asks for, free to be taken by something else."""
    if TARGET in file:
        file.move(TARGET, "moved_away")
    return TARGET


# ---- other files


@plant
def external_storage(file, victim):
    file.create_dataset(freed(file), (16,), "u1", external=[(str(victim), 0, 16)])


@plant
def external_storage_relative(file, victim):
    file.create_dataset(freed(file), (16,), "u1", external=[("../" * 20 + "etc/passwd", 0, 16)])


@plant
def external_storage_many_pieces(file, victim):
    pieces = [(str(victim), n, 1) for n in range(16)]
    file.create_dataset(freed(file), (16,), "u1", external=pieces)


@plant
def external_storage_unlimited(file, victim):
    pieces = [(str(victim), 0, h5f.UNLIMITED)]
    file.create_dataset(freed(file), (16,), "u1", maxshape=(None,), external=pieces)


@plant
def external_storage_device(file, victim):
    file.create_dataset(freed(file), (1 << 20,), "u1", external=[("/dev/zero", 0, 1 << 20)])


@plant
def external_link(file, victim):
    file[freed(file)] = h5py.ExternalLink(str(victim), "/")


@plant
def external_link_relative(file, victim):
    file[freed(file)] = h5py.ExternalLink("../../../../etc/passwd", "/x")


@plant
def external_link_as_group(file, victim):
    file["group"] = h5py.ExternalLink(str(victim), "/")
    file[freed(file)] = h5py.SoftLink("/group/x")


@plant
def external_link_in_the_middle(file, victim):
    file.create_group("a/b")["c"] = h5py.ExternalLink(str(victim), "/")
    file[freed(file)] = h5py.SoftLink("/a/b/c/x")


@plant
def external_link_to_itself(file, victim):
    file["self"] = h5py.ExternalLink(Path(file.filename).name, "/self")


@plant
def external_link_to_fifo(file, victim):
    file["pipe"] = h5py.ExternalLink(str(victim.with_name("pipe")), "/")


@plant
def external_link_to_device(file, victim):
    file["zero"] = h5py.ExternalLink("/dev/zero", "/")


# ---- links


@plant
def soft_link_to_itself(file, victim):
    file["loop"] = h5py.SoftLink("/loop")


@plant
def soft_link_cycle(file, victim):
    file["a_loop"], file["b_loop"] = h5py.SoftLink("/b_loop"), h5py.SoftLink("/a_loop")


@plant
def soft_link_dangling(file, victim):
    file[freed(file)] = h5py.SoftLink("/nowhere")


@plant
def soft_link_alias(file, victim):
    freed(file)
    file["x_other"] = np.zeros(4)
    file[TARGET] = h5py.SoftLink("/x_other")


@plant
def hard_link_cycle(file, victim):
    group = file.create_group("ring")
    group["ring"] = group


@plant
def hard_link_alias(file, victim):
    freed(file)
    file["x_other"] = np.zeros(4)
    file[TARGET] = file["x_other"]


@plant
def many_links(file, victim):
    data = file.create_dataset("linked", data=np.zeros(2))
    for n in range(5000):
        file[f"l{n}"] = data


@plant
def many_soft_links(file, victim):
    group = file.create_group("soft")
    for n in range(3000):
        group[f"l{n}"] = h5py.SoftLink(f"/soft/l{n + 1}")


@plant
def external_link_of_5000_characters(file, victim):
    file.create_group("u")["x"] = h5py.ExternalLink(str(victim), "/" + "x" * 5000)


@plant
def deep_groups(file, victim):
    group = file
    for _ in range(1000):
        group = group.create_group("g")


@plant
def many_groups(file, victim):
    for n in range(2000):
        file.create_group(f"g{n}")


# ---- virtual data sets


def _virtual(file, name, source, shape=(4,), **named):
    layout = h5py.VirtualLayout(shape, "f4", **named)
    layout[:] = h5py.VirtualSource(source, "x", shape=shape)
    file.create_virtual_dataset(name, layout)


@plant
def virtual_other_file(file, victim):
    _virtual(file, freed(file), str(victim))


@plant
def virtual_missing_source(file, victim):
    _virtual(file, freed(file), "absent.h5")


@plant
def virtual_of_itself(file, victim):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(".", "own", shape=(4,))
    file.create_virtual_dataset("own", layout)


@plant
def virtual_cycle(file, victim):
    for name, other in (("v1", "v2"), ("v2", "v1")):
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource(".", other, shape=(4,))
        file.create_virtual_dataset(name, layout)


@plant
def virtual_unlimited(file, victim):
    layout = h5py.VirtualLayout((4,), "f4", maxshape=(None,))
    source = h5py.VirtualSource(str(victim), "x", shape=(4,), maxshape=(None,))
    layout[: h5s.UNLIMITED] = source[: h5s.UNLIMITED]
    file.create_virtual_dataset(freed(file), layout)


@plant
def virtual_printf_names(file, victim):
    space = h5s.create_simple((4,), (h5s.UNLIMITED,))
    space.select_hyperslab((0,), (h5s.UNLIMITED,), stride=(1,), block=(1,))
    source = h5s.create_simple((1,))
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_virtual(space, b"../%b.h5", b"x", source)
    h5d.create(file.id, b"many", h5t.IEEE_F32LE, space, creation)


@plant
def virtual_of_many_pieces(file, victim):
    layout = h5py.VirtualLayout((500,), "f4")
    for n in range(500):
        layout[n : n + 1] = h5py.VirtualSource(f"{victim}{n}", "x", shape=(1,))
    file.create_virtual_dataset("pieces", layout)


# ---- filters and bombs


@plant
def gzip_bomb(file, victim):
    file.create_dataset("bomb", data=np.zeros(1 << 26, "u1"), chunks=(1 << 26,), compression=9)


@plant
def gzip_declared_64_gib(file, victim):
    file.create_dataset("bomb", (1 << 36,), "u1", chunks=(1 << 20,), compression="gzip")


@plant
def unknown_filter(file, victim):
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_chunk((16,))
    creation.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, (1, 2, 3))
    space = h5s.create_simple((16,))
    h5d.create(file.id, freed(file).encode(), h5t.STD_U8LE, space, creation)


@plant
def fletcher(file, victim):
    file.create_dataset(freed(file), data=np.zeros(64), chunks=(8,), fletcher32=True)


@plant
def shuffle_gzip(file, victim):
    file.create_dataset(freed(file), data=np.arange(64), compression="gzip", shuffle=True)


@plant
def lzf(file, victim):
    file.create_dataset(freed(file), data=np.arange(64), compression="lzf")


@plant
def scale_offset(file, victim):
    file.create_dataset(freed(file), data=np.arange(64), chunks=(8,), scaleoffset=4)


@plant
def declared_2_tib(file, victim):
    file.create_dataset("huge", (1 << 41,), "u1", chunks=(1 << 20,))


@plant
def unallocated_contiguous(file, victim):
    file.create_dataset(freed(file), (1 << 33,), "f4")


@plant
def chunk_of_2_gib(file, victim):
    file.create_dataset("chunk", (1 << 31,), "u1", chunks=((1 << 31) - 1,), compression="gzip")


@plant
def a_million_chunks(file, victim):
    file.create_dataset("chunks", (1 << 40,), "u1", chunks=(1,))


@plant
def many_datasets(file, victim):
    for n in range(2000):
        file.create_dataset(f"d{n}", (1 << 31,), "u1")


@plant
def chunked(file, victim):
    file.create_dataset(freed(file), data=np.zeros((12, 3, 5), "f2"), chunks=(1, 3, 5))


@plant
def compact(file, victim):
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.COMPACT)
    space = h5s.create_simple((16,))
    h5d.create(file.id, freed(file).encode(), h5t.STD_U8LE, space, creation)


@plant
def fill_value(file, victim):
    file.create_dataset(freed(file), (12, 3, 5), "f2", fillvalue=7)


@plant
def resizable(file, victim):
    file.create_dataset(freed(file), (12, 3, 5), "f2", maxshape=(None, 3, 5))


# ---- types


def _typed(name, dtype, shape=(4,)):
    def make_it(file, victim):
        file.create_dataset(freed(file), shape, dtype)

    make_it.__name__ = name
    plant(make_it)


_typed("big_endian", ">f4")
_typed("big_endian_integers", ">i8")
_typed("float128", np.longdouble)
_typed("complex", "c16")
_typed("boolean", "?")
_typed("double", "f8")
_typed("compound", [("a", "f2"), ("b", "i8")])
_typed("nested_compound", [("a", [("b", [("c", "f2", (3,))])])])
_typed("opaque", np.dtype("V16"))
_typed("fixed_string", "S10")
_typed("vlen_text", h5py.string_dtype())
_typed("vlen_numbers", h5py.vlen_dtype("f4"))
_typed("array_type", np.dtype(("f4", (7, 7))))
_typed("enumeration", h5py.enum_dtype({"A": 0, "B": 1}))
_typed("object_references", h5py.ref_dtype)
_typed("region_references", h5py.regionref_dtype)
_typed("rank_32", "u1", (1,) * 32)
_typed("scalar", "f4", ())
_typed("zero_length", "f4", (0, 1 << 40))


@plant
def odd_bits(file, victim):
    kind = h5t.STD_I64LE.copy()
    kind.set_precision(60)
    h5d.create(file.id, freed(file).encode(), kind, h5s.create_simple((4,)))


@plant
def bits_of_a_float_moved(file, victim):
    kind = h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 8, 7, 0, 8)
    h5d.create(file.id, freed(file).encode(), kind, h5s.create_simple((12, 3, 5)))


@plant
def null_space(file, victim):
    file.create_dataset(freed(file), data=h5py.Empty("f4"))


@plant
def committed_type(file, victim):
    file["kind"] = np.dtype("f4")
    file.create_dataset(freed(file), (4,), file["kind"])


@plant
def reference_to_nothing(file, victim):
    data = file.create_dataset("refs", (2,), h5py.ref_dtype)
    group = file.create_group("gone")
    data[0] = group.ref
    del file["gone"]


@plant
def vlen_filled(file, victim):
    file.create_dataset("v", (3,), h5py.string_dtype())[:] = ["a" * 100, "b", "c"]


# ---- attributes


@plant
def one_attribute(file, victim):
    file.attrs["note"] = 1


@plant
def attribute_flood(file, victim):
    for n in range(3000):
        file.attrs[f"a{n}"] = n


@plant
def huge_attribute(file, victim):
    group = file.create_group("attributed", track_order=True)
    group.attrs.create("big", np.zeros(8000), dtype="f8")
    file.attrs["vlen"] = ["x" * 100000] * 20


@plant
def attribute_on_a_dataset(file, victim):
    target = file[TARGET] if TARGET in file else file.create_dataset(TARGET, data=np.zeros(3))
    target.attrs["scale"] = 1000.0


@plant
def attribute_with_a_reference(file, victim):
    file.attrs["ref"] = file.ref


@plant
def dimension_scales(file, victim):
    data = file.create_dataset("scaled", data=np.zeros(3))
    axis = file.create_dataset("axis", data=np.zeros(3))
    axis.make_scale("x")
    data.dims[0].attach_scale(axis)


# ---- what hides


@plant
def hidden_dataset(file, victim):
    file["hidden"] = np.zeros(3)


@plant
def hidden_in_a_group(file, victim):
    file["deep/er/hidden"] = np.arange(5)


@plant
def swapped_names(file, victim):
    if "layers__keys" in file:
        file.move("layers__keys", "x")
        file.move("layers__digests", "layers__keys")
        file.move("x", "layers__digests")
    else:
        file["layers__keys"] = np.zeros(3)


@plant
def missing_dataset(file, victim):
    freed(file)
    if "moved_away" in file:
        file.move("moved_away", "z")


@plant
def other_shape(file, victim):
    file.create_dataset(freed(file), data=np.zeros((6, 6, 5), "f2"))


@plant
def other_values_under_the_name(file, victim):
    file.create_dataset(freed(file), data=np.full((12, 3, 5), 7, "f2"))


@plant
def names_of_traversal(file, victim):
    file["../../../tmp/x"] = np.zeros(1)
    file["...."] = np.zeros(1)


@plant
def names_that_deceive(file, victim):
    for name in ("layers__valuеs", "\u202eseulav__sreyal", "a\x1b[2Jb", "line\nbreak"):
        file[name] = np.zeros(1)


@plant
def name_of_5000_characters(file, victim):
    file["n" * 5000] = np.zeros(1)


@plant
def script_in_a_dataset(file, victim):
    file["run"] = np.frombuffer(b"#!/bin/sh\ntouch /tmp/pwned\n", "u1")


@plant
def nan_and_infinity(file, victim):
    file.create_dataset(freed(file), data=np.array([np.nan, np.inf, -np.inf, 0], "f4"))


@plant
def tracked_times(file, victim):
    file.create_dataset("timed", data=np.zeros(3), track_times=True)


@plant
def creation_order(file, victim):
    file.create_group("ordered", track_order=True)["x"] = np.zeros(2)


@plant
def free_space_left(file, victim):
    file["gone"] = np.full(1000, 7.0)
    file.flush()
    del file["gone"]


# ---- bytes of a finished file


def _data_at(path: Path) -> tuple[int, int]:
    """Place and length of a data set, as HDF5 sees them (from the start of the file)."""
    with h5py.File(path, "r") as file:
        names = [n for n in file if isinstance(file[n], h5py.Dataset) and file[n].id.get_offset()]
        chosen = file[TARGET if TARGET in names else names[0]]
        return int(chosen.id.get_offset()), int(chosen.id.get_storage_size())


def _replace_address(path: Path, new: Callable[[int, int], int]) -> None:
    """Writes another address into the layout message of a data set (v18 files have base 0)."""
    start, size = _data_at(path)
    raw = bytearray(path.read_bytes())
    base = int.from_bytes(raw[8:16], "little") if raw[:6] == b"VADEMC" else 0
    base = make_base(raw) if base else 0
    old = (start - base).to_bytes(8, "little") + size.to_bytes(8, "little")
    at = raw.find(old, base)
    if at < 0:
        msg = "no layout message found"
        raise AssertionError(msg)
    raw[at : at + 8] = (new(start, len(raw)) - base & (2**64 - 1)).to_bytes(8, "little")
    path.write_bytes(raw)


def make_base(raw: bytes) -> int:
    """Where the HDF5 part of a file starts."""
    at = 0
    while raw[at : at + 4] != b"\x89HDF":
        at = at * 2 or 512
    return at


@patch
def extent_past_the_end(path, victim):
    _replace_address(path, lambda start, size: size + 4096)


@patch
def extent_overlaps_the_root(path, victim):
    _replace_address(path, lambda start, size: make_base(path.read_bytes()))


@patch
def extent_over_another(path, victim):
    _replace_address(path, lambda start, size: start - 64)


@patch
def extent_undefined(path, victim):
    _replace_address(path, lambda start, size: 2**64 - 1 + make_base(path.read_bytes()))


@patch
def extent_near_2_63(path, victim):
    _replace_address(path, lambda start, size: 2**63)


def _flip(path: Path, at: int, raw: bytes = b"\xff" * 8) -> None:
    base = make_base(path.read_bytes())
    with path.open("r+b") as file:
        file.seek(base + at)
        file.write(raw)


@patch
def superblock_base_address(path, victim):
    _flip(path, 12, (1 << 40).to_bytes(8, "little"))


@patch
def superblock_end_of_file(path, victim):
    _flip(path, 28, (1 << 60).to_bytes(8, "little"))


@patch
def superblock_root_address(path, victim):
    _flip(path, 36, (12).to_bytes(8, "little"))


@patch
def superblock_extension_to_itself(path, victim):
    _flip(path, 20, (0).to_bytes(8, "little"))


@patch
def superblock_version(path, victim):
    _flip(path, 8, b"\x09")


@patch
def superblock_sizes(path, victim):
    _flip(path, 9, b"\xff\xff")


@patch
def root_object_header(path, victim):
    raw = path.read_bytes()
    at = raw.find(b"OHDR", make_base(raw))
    _flip(path, at - make_base(raw) + 4, b"\x02\xff\xff\xff\xff\xff\xff\xff")


@patch
def zeroed_hdf5_part(path, victim):
    base, size = make_base(path.read_bytes()), path.stat().st_size
    with path.open("r+b") as file:
        file.seek(base)
        file.write(bytes(size - base))


@patch
def no_signature(path, victim):
    _flip(path, 0, b"PK\x03\x04PK\x03\x04")


@patch
def trailing_bytes(path, victim):
    path.write_bytes(path.read_bytes() + b"#!/bin/sh\n" * 20)


@patch
def trailing_zip(path, victim):
    path.write_bytes(path.read_bytes() + b"PK\x05\x06" + bytes(18))


@patch
def second_hdf5_file_behind(path, victim):
    raw = path.read_bytes()
    path.write_bytes(raw + raw[make_base(raw) :])


@patch
def second_signature_in_a_gap(path, victim):
    raw = bytearray(path.read_bytes())
    base = make_base(raw)
    gap = raw.find(bytes(64), base + 48)
    raw[gap : gap + 8] = raw[base : base + 8]
    path.write_bytes(raw)


@patch
def vlen_bad_pointer(path, victim):
    with h5py.File(path, "r+") as file:
        file.create_dataset("v", (1,), h5py.string_dtype())[0] = "pointed at from far away"
        at = int(file["v"].id.get_offset())
    raw = bytearray(path.read_bytes())
    raw[at : at + 12] = (1 << 31).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")
    path.write_bytes(raw)


@patch
def cut_in_half(path, victim):
    raw = path.read_bytes()
    path.write_bytes(raw[: make_base(raw) + (len(raw) - make_base(raw)) // 2])


# ---- whole files that are no seals at all


def script_polyglot(path: Path, victim: Path) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:
        file[TARGET] = np.zeros((2, 3))
    raw = bytearray(path.read_bytes())
    raw[:24] = b"#!/bin/sh\necho pwned\n#aaa"[:24]
    path.write_bytes(raw)


def zip_polyglot(path: Path, victim: Path) -> None:
    script_polyglot(path, victim)
    raw = path.read_bytes()
    path.write_bytes(b"PK\x03\x04" + raw[4:] + b"PK\x05\x06" + bytes(18))


def latest_library(path: Path, victim: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        file[TARGET] = np.zeros((2, 3))


def plain_cache_of_the_usual_kind(path: Path, victim: Path) -> None:
    with h5py.File(path, "w") as file:
        for n in range(5):
            file[f"class/{n}"] = np.zeros((2, 3))
        file.attrs["model"] = "org/name"


def magic_and_then_hdf5(path: Path, victim: Path) -> None:
    with h5py.File(path, "w", userblock_size=4096) as file:
        file[TARGET] = h5py.ExternalLink(str(victim), "/")
    raw = bytearray(path.read_bytes())
    raw[:16] = b"VADEMC\0\x01" + (100).to_bytes(8, "little")
    path.write_bytes(raw)


WHOLE: dict[str, Patch] = {
    one.__name__: one
    for one in (
        script_polyglot,
        zip_polyglot,
        latest_library,
        plain_cache_of_the_usual_kind,
        magic_and_then_hdf5,
    )
}


@dataclass(frozen=True)
class Attack:
    """One hostile file on the disk."""

    name: str
    form: str
    path: Path


def _planted(make_it: Plant, victim: Path, mode: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, mode) as file:
            make_it(file, victim)

    return change


def _patched(make_it: Patch, victim: Path, *, fresh: bool) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        if fresh:
            with h5py.File(path, "w", libver=("v108", "v108")) as file:
                file["first"] = np.arange(1000.0)
                file[TARGET] = np.arange(777.0)
        make_it(path, victim)

    return change


def build(folder: Path, victim: Path, sealed: bytes) -> list[Attack]:
    """Writes every hostile file into `folder`; `sealed` is a sound cache."""
    made = []
    for name, make_it in PLANTS.items():
        path = folder / f"plain-{name}.h5"
        _planted(make_it, victim, "w")(path)
        made.append(Attack(name, "plain", path))
        path = folder / f"sealed-{name}.h5"
        forge.seal_over(path, sealed, _planted(make_it, victim, "r+"))
        made.append(Attack(name, "sealed", path))
    for name, spoil in PATCHES.items():
        path = folder / f"plain-{name}.h5"
        _patched(spoil, victim, fresh=True)(path)
        made.append(Attack(name, "plain", path))
        path = folder / f"sealed-{name}.h5"
        forge.seal_over(path, sealed, _patched(spoil, victim, fresh=False))
        made.append(Attack(name, "sealed", path))
    for name, whole in WHOLE.items():
        path = folder / f"plain-{name}.h5"
        whole(path, victim)
        made.append(Attack(name, "plain", path))
    return made
