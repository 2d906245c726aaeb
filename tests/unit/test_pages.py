"""The page pool: who holds what, what is kept, what is evicted."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.errors import EngineError
from jaxserve.kvcache.pages import PagePool
from jaxserve.kvcache.prefix import PrefixChain

G = 4


def indexed_pool(num_pages=4, tokens=(1, 2, 3, 4, 5, 6, 7, 8)):
    """A pool whose first pages are cached and hold ``tokens``; returns it with the pages and their chain."""
    pool, chain = PagePool(num_pages, G), PrefixChain(b"root", G)
    pages = pool.alloc(len(tokens) // G)
    for place, page in enumerate(pages):
        assert pool.insert(page, chain.digest(place, tokens))
    pool.free(pages)
    return pool, pages, chain


def test_alloc_gives_every_page_once_and_then_none():
    pool = PagePool(5, G)
    pages = pool.alloc(2) + pool.alloc(3)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert pool.alloc(1) is None
    assert pool.num_used == 5


def test_pages_are_taken_one_by_one_as_well():
    pool = PagePool(3, G)
    assert sorted(pool.alloc_one() for _ in range(3)) == [0, 1, 2]
    assert pool.alloc_one() is None
    pool.check([[0, 1, 2]])


def test_an_alloc_that_is_refused_takes_nothing():
    pool = PagePool(3, G)
    assert pool.alloc(4) is None
    assert pool.num_free == 3


def test_alloc_of_no_pages_succeeds_in_a_full_pool():
    pool = PagePool(1, G)
    pool.alloc(1)
    assert pool.alloc(0) == []


def test_a_shared_page_is_free_after_its_last_holder():
    pool = PagePool(1, G)
    (page,) = pool.alloc(1)
    pool.share(page)
    pool.free([page])
    assert (pool.refcount(page), pool.num_free) == (1, 0)
    pool.free([page])
    assert pool.num_free == 1


def test_freeing_twice_raises():
    pool = PagePool(2, G)
    pages = pool.alloc(1)
    pool.free(pages)
    with pytest.raises(EngineError, match="freed twice"):
        pool.free(pages)


def test_sharing_a_free_page_raises():
    with pytest.raises(EngineError, match="is free"):
        PagePool(2, G).share(0)


def test_an_indexed_page_stays_cached_when_nobody_holds_it():
    pool, pages, chain = indexed_pool()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 2, 0)
    assert pool.longest_prefix(chain, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == pages


def test_a_cached_page_is_revived_by_sharing():
    pool, pages, _ = indexed_pool()
    pool.share(pages[0])
    assert (pool.num_cached, pool.num_used) == (1, 1)
    pool.check([[pages[0]]])


def test_free_pages_are_taken_before_cached_ones():
    pool, pages, _ = indexed_pool()
    assert not set(pool.alloc(2)) & set(pages)
    assert pool.num_cached == 2


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool, pages, chain = indexed_pool(num_pages=2)
    assert pool.alloc(1) == [pages[1]]
    assert pool.longest_prefix(chain, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == pages[:1]


def test_the_least_recently_held_page_is_evicted_first():
    pool = PagePool(3, G)
    a, b, c = pool.alloc(3)
    for page in (a, b, c):
        pool.insert(page, bytes([page]))
        pool.free([page])
    pool.share(a)
    pool.free([a])
    assert [pool.alloc(1)[0] for _ in range(3)] == [b, c, a]


def test_an_evicted_page_is_not_found_any_more():
    pool, _, chain = indexed_pool(num_pages=2)
    pool.alloc(2)
    assert pool.longest_prefix(chain, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == []


def test_the_older_of_two_equal_pages_stays_indexed():
    pool, chain = PagePool(2, G), PrefixChain(b"root", G)
    old, new = pool.alloc(2)
    digest = chain.digest(0, [1, 2, 3, 4])
    assert pool.insert(old, digest)
    assert not pool.insert(new, digest)
    assert pool.longest_prefix(chain, [1, 2, 3, 4, 5]) == [old]
    pool.free([new])
    assert pool.num_free == 1


def test_forgetting_a_cached_page_frees_it():
    pool, pages, chain = indexed_pool()
    pool.forget_digest(chain.digest(1, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert (pool.num_free, pool.num_cached) == (3, 1)
    assert not pool.is_indexed(pages[1])


def test_forgetting_a_held_page_leaves_it_to_its_holder():
    pool, pages, _ = indexed_pool()
    pool.share(pages[0])
    pool.forget(pages[0])
    pool.check([[pages[0]]])
    pool.free([pages[0]])
    assert pool.num_free == 3


def test_forgetting_an_unknown_digest_changes_nothing():
    pool, _, _ = indexed_pool()
    pool.forget_digest(b"never seen")
    assert pool.num_cached == 2


def test_dropping_the_cache_frees_what_nobody_holds():
    pool, pages, chain = indexed_pool()
    pool.share(pages[0])
    pool.drop_cache()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 0, 1)
    assert pool.longest_prefix(chain, [1, 2, 3, 4, 5]) == []


def test_without_a_prefix_cache_nothing_is_kept():
    pool, chain = PagePool(2, G, enable_prefix_cache=False), PrefixChain(b"root", G)
    pages = pool.alloc(1)
    assert not pool.insert(pages[0], chain.digest(0, [1, 2, 3, 4]))
    pool.free(pages)
    assert (pool.num_free, pool.longest_prefix(chain, [1, 2, 3, 4, 5])) == (2, [])


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "twice on the free list"),
        (lambda pool: pool._free.pop(), "not the whole pool"),
        (lambda pool: pool._cached.update({pool._free.pop(): None}), "cached page is not indexed"),
        (lambda pool: pool._index.insert(pool._free[0], b"digest"), "free page is indexed"),
    ],
)
def test_check_notices(spoil, complaint):
    pool, _, _ = indexed_pool()
    spoil(pool)
    with pytest.raises(EngineError, match=complaint):
        pool.check([])


def test_check_notices_a_table_that_holds_a_page_without_a_reference():
    pool, pages, _ = indexed_pool()
    with pytest.raises(EngineError, match="reference counts"):
        pool.check([[pages[0]]])


class PoolMachine(RuleBasedStateMachine):
    """Tables that grow, fork, copy and vanish; the model is the list of tables and a digest per written page."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(8, G)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what was last indexed in each page
        self.stamp = 0

    tables_exist = precondition(lambda self: self.tables)

    @rule(n=st.integers(0, 9))
    def admit(self, n):
        available = self.pool.num_available
        pages = self.pool.alloc(n)
        assert (pages is None) == (n > available)
        if pages:
            self.take(pages)
            self.tables.append(pages)

    @tables_exist
    @rule(data=st.data())
    def grow(self, data):
        pages = self.pool.alloc(1)
        if pages:
            self.take(pages)
            data.draw(st.sampled_from(self.tables)).append(pages[0])

    @tables_exist
    @rule(data=st.data())
    def fork(self, data):
        table = list(data.draw(st.sampled_from(self.tables)))
        for page in table:
            self.pool.share(page)
        self.tables.append(table)

    @tables_exist
    @rule(data=st.data())
    def copy_on_write(self, data):
        table = data.draw(st.sampled_from(self.tables))
        if table and self.pool.refcount(table[-1]) > 1 and (pages := self.pool.alloc(1)):
            self.take(pages)
            self.pool.free([table.pop()])
            table.append(pages[0])

    @tables_exist
    @rule(data=st.data(), repeat=st.booleans())
    def index(self, data, repeat):
        table = data.draw(st.sampled_from(self.tables))
        if not table:
            return
        self.stamp += not repeat
        page, digest = data.draw(st.sampled_from(table)), b"%d" % self.stamp
        named = self.pool.is_indexed(page) or digest in self.digests()
        assert self.pool.insert(page, digest) == (not named)
        if not named:
            self.content[page] = digest

    @rule(data=st.data())
    def hit(self, data):
        known = [page for page in self.content if self.pool.is_indexed(page)]
        if known:
            page = data.draw(st.sampled_from(known))
            self.pool.share(page)
            self.tables.append([page])

    @tables_exist
    @rule(data=st.data())
    def finish(self, data):
        table = data.draw(st.sampled_from(self.tables))
        self.tables = [other for other in self.tables if other is not table]
        self.pool.free(table)

    @tables_exist
    @rule(data=st.data())
    def free_too_often(self, data):
        idle = [page for page in range(self.pool.num_pages) if self.pool.refcount(page) == 0]
        if idle:
            with pytest.raises(EngineError):
                self.pool.free([data.draw(st.sampled_from(idle))])

    @rule(page=st.integers(0, 7))
    def republish(self, page):
        self.pool.forget(page)
        self.content.pop(page, None)

    @rule()
    def reset(self):
        self.pool.drop_cache()
        self.content = {}

    @invariant()
    def every_page_is_accounted_for(self):
        self.pool.check(self.tables)
        held = Counter(page for table in self.tables for page in set(table))
        assert self.pool.num_used == len(held)

    @invariant()
    def the_index_knows_exactly_what_was_put_there_and_not_evicted(self):
        for page, digest in self.content.items():
            assert self.pool.is_indexed(page)
            assert self.pool._index.page(digest) == page
        assert len(self.pool._index) == len(self.content)

    def digests(self):
        return set(self.content.values())

    def take(self, pages):
        """alloc may only have evicted pages that nobody held."""
        held = {page for table in self.tables for page in table}
        assert not held & set(pages)
        for page in pages:
            self.content.pop(page, None)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
