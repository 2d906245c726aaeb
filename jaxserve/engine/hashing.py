"""Hashes that are computed once."""

from typing import TypeVar

T = TypeVar("T")


def hashed_once(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass keep its hash: a jitted call hashes its static arguments each time, all the way down,
    and planning a step looks up many buckets."""
    compute = cls.__hash__

    def kept(self: T) -> int:
        fields = self.__dict__
        try:
            return fields["_hash"]
        except KeyError:
            fields["_hash"] = found = compute(self)
            return found

    cls.__hash__ = kept
    return cls
