"""Hands out the pages of the KV pool: reference counts, a free list, and an LRU of pages worth keeping.

Shapes: P pages, G tokens per page.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from jaxserve.errors import EngineError
from jaxserve.kvcache.prefix import PrefixChain, PrefixIndex


class PagePool:
    """Every page is free (no content), cached (indexed, nobody holds it) or used (held ``refcount`` times)."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_cache: bool = True):
        assert min(num_pages, page_size) > 0, f"{num_pages=} {page_size=}"
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_cache = enable_prefix_cache
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refcount = [0] * num_pages
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that alloc can give: free ones, then cached ones by eviction."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def refcount(self, page: int) -> int:
        return self._refcount[page]

    def is_indexed(self, page: int) -> bool:
        return page in self._index

    def alloc(self, n: int) -> list[int] | None:
        """n pages held once, or None (and nothing taken) when there are not enough."""
        if n > self.num_available:
            return None
        return [self._take() for _ in range(n)]

    def alloc_one(self) -> int | None:
        """The same for one page."""
        return self._take() if self._free or self._cached else None

    def share(self, page: int) -> None:
        """One more holder of a used or cached page."""
        if self._refcount[page] == 0:
            if page not in self._cached:
                raise EngineError(f"page {page} is free and cannot be shared")
            del self._cached[page]
        self._refcount[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One holder fewer of each page, last page first: the end of a prefix is evicted before its beginning."""
        counts = self._refcount
        for page in reversed(pages):
            held = counts[page]
            if held == 0:
                raise EngineError(f"page {page} is freed twice")
            counts[page] = held - 1
            if held == 1:
                self._retire(page)

    def longest_prefix(self, chain: PrefixChain, tokens: Sequence[int]) -> list[int]:
        """The longest run of indexed full pages that begins tokens[:-1]: one token is always left to compute."""
        pages: list[int] = []
        if self.enable_prefix_cache:
            for place in range((len(tokens) - 1) // self.page_size):
                page = self._index.page(chain.digest(place, tokens))
                if page is None:
                    break
                pages.append(page)
        return pages

    def insert(self, page: int, digest: bytes) -> bool:
        """Indexes a held, full page; False when the digest is known already or there is no prefix cache."""
        assert self._refcount[page] > 0, f"page {page} is indexed while nobody holds it"
        return self.enable_prefix_cache and self._index.insert(page, digest)

    def forget(self, page: int) -> None:
        """Takes a page out of the index; its holders keep it."""
        self._index.remove(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def forget_digest(self, digest: bytes) -> None:
        """Takes whatever page has this digest out of the index."""
        page = self._index.page(digest)
        if page is not None:
            self.forget(page)

    def drop_cache(self) -> None:
        """Empties the index: no later request finds anything computed until now."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._index = PrefixIndex()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises EngineError unless all pages are accounted for and held exactly as often as ``tables`` say."""
        held = Counter(page for table in tables for page in table)
        free, cached = set(self._free), set(self._cached)
        used = {page for page, count in enumerate(self._refcount) if count}
        _require(len(free) == len(self._free), "a page is twice on the free list")
        _require(len(free) + len(cached) + len(used) == self.num_pages, "free + cached + used is not the whole pool")
        _require(free | cached | used == set(range(self.num_pages)), "a page is in no state or in two")
        _require(held == Counter({page: self._refcount[page] for page in used}), "reference counts are not the holders")
        _require(all(page in self._index for page in cached), "a cached page is not indexed")
        _require(not any(page in self._index for page in free), "a free page is indexed")

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._index.remove(page)
        self._refcount[page] = 1
        return page

    def _retire(self, page: int) -> None:
        if page in self._index:
            self._cached[page] = None
        else:
            self._free.append(page)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EngineError(f"page pool: {otherwise}")
