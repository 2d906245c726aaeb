"""Which adapter versions are in the device's bank, and where.

The bank is paged by rank: a page holds RANKS_PER_PAGE ranks of every member of every layer, and an adapter takes as
many pages as its largest rank asks for, anywhere. So a rank-8 adapter costs a page whatever its neighbours cost.
Page 0 is all zeros and belongs to nobody. Content is kept by digest: two names of the same content share pages.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.adapters.store import AdapterVersion
from jaxserve.errors import EngineError

RANKS_PER_PAGE = 16


@dataclass
class _Resident:
    version: AdapterVersion
    pages: tuple[int, ...]
    refs: int = 0
    dropped: bool = False  # to be freed with the last reference


@dataclass(frozen=True)
class ResidencyCounts:
    """Pages (without page 0) and versions in the bank."""

    num_pages: int
    num_free: int
    num_used: int
    num_resident: int
    num_pinned: int
    num_refs: int


class Residency:
    """Page table of an adapter bank of ``num_pages`` pages, page 0 included. For one thread.

    ``upload(version, pages)`` copies a version's weights into those pages; it is called before the version counts as
    resident, and when it raises nothing stays allocated.
    """

    def __init__(self, num_pages: int, upload: Callable[[AdapterVersion, list[int]], None]):
        if num_pages < 1:
            raise ValueError(f"num_pages {num_pages} must be at least 1, page 0")
        self.num_pages = num_pages
        self._upload = upload
        self._free = list(range(num_pages - 1, 0, -1))  # a stack, low pages first
        self._residents: OrderedDict[bytes, _Resident] = OrderedDict()  # least recently used first

    def fits(self, version: AdapterVersion | None) -> bool:
        """Whether the version could ever be resident, alone."""
        return version is None or num_pages_of(version) < self.num_pages

    def try_acquire(self, version: AdapterVersion | None) -> bool:
        """Makes the version resident and pins it once; False if there is no room now. None, the base, always is.

        Unpinned versions leave, the longest unused first, when pages are short; none leaves in vain.
        """
        if version is None:
            return True
        resident = self._residents.get(version.digest) or self._enter(version)
        if resident is None:
            return False
        resident.refs += 1
        self._residents.move_to_end(version.digest)
        return True

    def release(self, version: AdapterVersion | None) -> None:
        """Takes one ``try_acquire`` back. Raises EngineError if there is none."""
        if version is None:
            return
        resident = self._residents.get(version.digest)
        if resident is None or resident.refs == 0:
            raise EngineError(f"adapter {version.name!r} version {version.version} released without being acquired")
        resident.refs -= 1
        if resident.dropped and resident.refs == 0:
            self._leave(version.digest)

    def drop(self, version: AdapterVersion) -> None:
        """Frees the version's pages, at its last release if it is pinned. Not resident: nothing to do."""
        resident = self._residents.get(version.digest)
        if resident is None:
            return
        resident.dropped = True
        if resident.refs == 0:
            self._leave(version.digest)

    def pages_of(self, version: AdapterVersion | None) -> tuple[int, ...]:
        """The version's pages in order of rank; () for the base. Raises EngineError if it is not resident."""
        if version is None:
            return ()
        if version.digest not in self._residents:
            raise EngineError(f"adapter {version.name!r} version {version.version} is not in the bank")
        return self._residents[version.digest].pages

    def resident(self) -> list[AdapterVersion]:
        """The versions in the bank, the longest unused first."""
        return [resident.version for resident in self._residents.values()]

    def counts(self) -> ResidencyCounts:
        residents = self._residents.values()
        return ResidencyCounts(
            num_pages=self.num_pages - 1,
            num_free=len(self._free),
            num_used=sum(len(resident.pages) for resident in residents),
            num_resident=len(residents),
            num_pinned=sum(resident.refs > 0 for resident in residents),
            num_refs=sum(resident.refs for resident in residents),
        )

    def check(self) -> None:
        """Raises EngineError unless every page but page 0 has exactly one place, and references make sense."""
        pages = [*self._free, *(page for resident in self._residents.values() for page in resident.pages)]
        if sorted(pages) != list(range(1, self.num_pages)):
            raise EngineError(f"adapter bank: free and used pages are {sorted(pages)}, of {self.num_pages}")
        for digest, resident in self._residents.items():
            wrong = digest != resident.version.digest or len(resident.pages) != num_pages_of(resident.version)
            if wrong or resident.refs < 0 or (resident.dropped and resident.refs == 0):
                raise EngineError(f"adapter bank: bad entry {resident}")

    def _enter(self, version: AdapterVersion) -> _Resident | None:
        if not self._make_room(num_pages_of(version)):
            return None
        pages = [self._free.pop() for _ in range(num_pages_of(version))]
        try:
            self._upload(version, pages)
        except BaseException:
            self._free.extend(reversed(pages))
            raise
        self._residents[version.digest] = _Resident(version, tuple(pages))
        return self._residents[version.digest]

    def _make_room(self, num_pages: int) -> bool:
        idle = [digest for digest, resident in self._residents.items() if resident.refs == 0]
        if num_pages > len(self._free) + sum(len(self._residents[digest].pages) for digest in idle):
            return False
        for digest in idle:
            if num_pages <= len(self._free):
                break
            self._leave(digest)
        return True

    def _leave(self, digest: bytes) -> None:
        self._free.extend(reversed(self._residents.pop(digest).pages))


def num_pages_of(version: AdapterVersion) -> int:
    """Pages a version takes: its largest rank in pages, and at least one."""
    return max(1, -(-version.rank // RANKS_PER_PAGE))
