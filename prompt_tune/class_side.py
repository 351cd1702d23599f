"""What depends on classes and weights alone, computed once while the weights stand still."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class ClassSide:
    """Remembers what is computed while it is `kept`, and nothing otherwise."""

    def __init__(self) -> None:
        self._known: dict[str, Any] | None = None

    def __call__(self, name: str, compute: Callable[[], Value]) -> Value:
        """The value of that name."""
        if self._known is None:
            return compute()
        if name not in self._known:
            self._known[name] = compute()
        value: Value = self._known[name]
        return value

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The time in which no weight changes; afterwards all is forgotten."""
        self._known = {}
        try:
            yield
        finally:
            self._known = None


class _HasClassSide(Protocol):
    class_side: ClassSide


Owner = TypeVar("Owner", bound=_HasClassSide)


def of_classes(compute: Callable[[Owner], Value]) -> Callable[[Owner], Value]:
    """A method's method that depends on its classes and weights alone."""

    @functools.wraps(compute)
    def known(self: Owner) -> Value:
        return self.class_side(compute.__qualname__, lambda: compute(self))

    return known
