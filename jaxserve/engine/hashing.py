"""Hashes of static arguments."""

from typing import TypeVar

T = TypeVar("T")


def hashed_once(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass keep its hash: a jitted call hashes its static arguments each time, all the way down."""
    compute = cls.__hash__

    def kept(self: T) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = compute(self)
        return found

    cls.__hash__ = kept
    return cls
