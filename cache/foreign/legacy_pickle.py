"""What a pickle says about a tensor, without unpickling.

The pickle is read as data by a machine that knows the few opcodes a bare tensor needs and six names
that it never imports. Nothing is called, so nothing can run.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cache.errors import CacheFormatError

ITEMSIZE = {"Half": 2, "BFloat16": 2, "Float": 4, "Double": 8}
REBUILD = "torch._utils._rebuild_tensor_v2"
HOOKS = "collections.OrderedDict"
STORAGES = {f"torch.{name}Storage": name for name in ITEMSIZE}
NAMES = {REBUILD, HOOKS, *STORAGES}

LARGEST_PICKLE = 1 << 16
MOST_STEPS = 4096
BARE = "Save the bare tensor: torch.save(tensor, path)."
_NAMED = (
    "MARK STOP POP POP_MARK DUP FLOAT INT BININT BININT1 LONG BININT2 NONE PERSID BINPERSID "
    "REDUCE STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE APPEND BUILD GLOBAL DICT "
    "EMPTY_DICT APPENDS GET BINGET INST LONG_BINGET EMPTY_LIST LIST OBJ PUT BINPUT LONG_BINPUT "
    "SETITEM TUPLE BINFLOAT EMPTY_TUPLE SETITEMS BINBYTES SHORT_BINBYTES PROTO NEWOBJ EXT1 "
    "EXT2 EXT4 TUPLE1 TUPLE2 TUPLE3 NEWTRUE NEWFALSE LONG1 LONG4 SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES8 EMPTY_SET ADDITEMS FROZENSET NEWOBJ_EX STACK_GLOBAL MEMOIZE FRAME BYTEARRAY8 "
    "NEXT_BUFFER READONLY_BUFFER"
)
_CODES = rb"(.012FIJKLMNPQRSTUVXabcd}eghij]lopqrstG)uBC" + bytes(range(0x80, 0x99))
OPCODES = dict(zip(_CODES, _NAMED.split(), strict=True))
_DEVICE = re.compile(r"[a-z]{2,10}(:[0-9]{1,3})?")


def refuse(what: str, found: object = None, do: str | None = None) -> NoReturn:
    """Never returns.

    Raises:
        CacheFormatError: always.
    """
    raise CacheFormatError(what, found=found, do=do)


class _Mark:
    """The opcode MARK, on the stack."""


@dataclass(frozen=True)
class _Name:
    """One of `NAMES`; never imported."""

    text: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    count: int


class _Hooks:
    """An empty table of hooks."""


@dataclass(frozen=True)
class Tensor:
    """What a pickle says about its tensor; numbers are in elements, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _storage(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        refuse("the pickle refers to something that is no storage")
    _, kind, key, device, count = pid
    if type(kind) is not _Name or kind.text not in STORAGES:
        refuse("the pickle names a storage of an unknown type", do=BARE)
    sound = type(key) is str and re.fullmatch(r"[0-9]{1,4}", key) and _whole(count)
    if not sound or type(device) is not str or not _DEVICE.fullmatch(device):
        refuse("the pickle refers to a storage in a way torch does not")
    return _Storage(STORAGES[kind.text], key, count)


def _tensor(args: tuple[Any, ...]) -> Tensor:
    if len(args) != 6 or type(args[0]) is not _Storage or type(args[5]) is not _Hooks:
        refuse("the pickle builds a tensor in a way torch does not", do=BARE)
    storage, offset, shape, strides, needs_gradient, _ = args
    whole = all(type(t) is tuple and all(map(_whole, t)) for t in (shape, strides))
    if not whole or not _whole(offset) or type(needs_gradient) is not bool:
        refuse("the shape, strides or offset of the tensor are no counts")
    if len(shape) != len(strides) or len(shape) > 8:
        refuse("the tensor has as many strides as dimensions in no sound file")
    return Tensor(storage, offset, shape, strides)


class Machine:
    """Reads a pickle; `run` gives the one thing it may hold, a bare tensor.

    Args:
        raw: the pickle.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Tensor:
        """The tensor the pickle describes.

        Raises:
            CacheFormatError: an opcode, name or value that a bare tensor has no use for.
        """
        for _ in range(MOST_STEPS):
            code = self._take(1)[0]
            name = OPCODES.get(code, f"0x{code:02x}")
            if name == "STOP":
                return self._result()
            step = _STEPS.get(name)
            if step is None:
                refuse(f"the pickle holds the opcode {name}, which a bare tensor does not", do=BARE)
            step(self)
        refuse("the pickle has more steps than a bare tensor needs")

    def _result(self) -> Tensor:
        if self._at != len(self._raw):
            refuse("bytes follow the end of the pickle")
        if len(self._stack) != 1 or type(self._stack[0]) is not Tensor:
            refuse("the pickle does not hold a bare tensor", do=BARE)
        made: Tensor = self._stack[0]
        return made

    def _take(self, count: int) -> bytes:
        piece = self._raw[self._at : self._at + count]
        if len(piece) != count:
            refuse("the pickle ends in the middle")
        self._at += count
        return piece

    def _unsigned(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._at, self._at + 100)
        if end < 0:
            refuse("the pickle holds a name without an end")
        piece = self._take(end - self._at + 1)[:-1]
        return piece.decode("ascii", "replace")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or type(self._stack[-1]) is _Mark:
            refuse("the pickle takes from an empty stack")
        return self._stack.pop()

    def _text(self, width: int) -> None:
        length = self._unsigned(width)
        if length > 100:
            refuse("the pickle holds a text longer than a bare tensor needs")
        self._push(self._take(length).decode("utf-8", "replace"))

    def _name(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if type(module) is type(name) is str else "no name"
        if full not in NAMES:
            refuse("the pickle names something it may not", found=ascii(full[:100]), do=BARE)
        self._push(_Name(full))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _tuple(self) -> None:
        items: list[Any] = []
        while self._stack and type(self._stack[-1]) is not _Mark:
            items.append(self._stack.pop())
        if not self._stack:
            refuse("the pickle closes what it did not open")
        self._stack.pop()
        self._push(tuple(reversed(items)))

    def _tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _reduce(self) -> None:
        args, name = self._pop(), self._pop()
        if type(name) is not _Name or type(args) is not tuple:
            refuse("the pickle calls something that is no name")
        if name.text == HOOKS and args == ():
            self._push(_Hooks())
        elif name.text == REBUILD:
            self._push(_tensor(args))
        else:
            refuse("the pickle calls a name with what it does not take", found=name.text)

    def _put(self, index: int) -> None:
        if not self._stack or type(self._stack[-1]) is _Mark or index > MOST_STEPS:
            refuse("the pickle remembers what is not there")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            refuse("the pickle recalls what it did not remember")
        self._push(self._memo[index])

    def _proto(self) -> None:
        if self._unsigned(1) not in {2, 3, 4, 5} or self._at != 2:
            refuse("the pickle has an unknown protocol")

    def _frame(self) -> None:
        if self._unsigned(8) > len(self._raw) - self._at:
            refuse("the pickle ends in the middle")


_STEPS: Mapping[str, Callable[[Machine], None]] = {
    "PROTO": Machine._proto,
    "FRAME": Machine._frame,
    "MARK": lambda m: m._push(_Mark()),
    "GLOBAL": lambda m: m._name(m._line(), m._line()),
    "STACK_GLOBAL": Machine._stack_global,
    "BINUNICODE": lambda m: m._text(4),
    "SHORT_BINUNICODE": lambda m: m._text(1),
    "BININT": lambda m: m._push(struct.unpack("<i", m._take(4))[0]),
    "BININT1": lambda m: m._push(m._unsigned(1)),
    "BININT2": lambda m: m._push(m._unsigned(2)),
    "NEWFALSE": lambda m: m._push(False),  # noqa: FBT003
    "NEWTRUE": lambda m: m._push(True),  # noqa: FBT003
    "EMPTY_TUPLE": lambda m: m._push(()),
    "TUPLE": Machine._tuple,
    "TUPLE1": lambda m: m._tuple_of(1),
    "TUPLE2": lambda m: m._tuple_of(2),
    "TUPLE3": lambda m: m._tuple_of(3),
    "BINPERSID": lambda m: m._push(_storage(m._pop())),
    "REDUCE": Machine._reduce,
    "BINPUT": lambda m: m._put(m._unsigned(1)),
    "LONG_BINPUT": lambda m: m._put(m._unsigned(4)),
    "MEMOIZE": lambda m: m._put(len(m._memo)),
    "BINGET": lambda m: m._get(m._unsigned(1)),
    "LONG_BINGET": lambda m: m._get(m._unsigned(4)),
}
