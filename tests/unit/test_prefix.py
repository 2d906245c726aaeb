"""Prefix identity: a hit means the same tenant, salt, base, adapter content and whole prefix."""

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.kvcache.pages import PagePool
from jaxserve.kvcache.prefix import PrefixChain, PrefixIndex, PrefixKey, page_digest

G = 2
KEY = {"tenant": "acme", "salt": "s", "base_digest": b"base", "adapter_digest": b"math@1"}


def test_equal_keys_have_equal_roots():
    assert PrefixKey(**KEY).root == PrefixKey(**KEY).root


@pytest.mark.parametrize(
    "change", [{"tenant": "other"}, {"salt": "t"}, {"base_digest": b"else"}, {"adapter_digest": b"math@2"}], ids=str
)
def test_each_part_of_the_key_changes_the_root(change):
    assert PrefixKey(**KEY).root != PrefixKey(**{**KEY, **change}).root


def test_moving_a_byte_between_parts_changes_the_root():
    assert PrefixKey(tenant="ab", salt="c").root != PrefixKey(tenant="a", salt="bc").root
    assert PrefixKey(base_digest=b"x").root != PrefixKey(adapter_digest=b"x").root


def test_the_digest_is_sha256_of_the_length_prefixed_parts():
    parent = b"\0" * 32
    tokens = b"\x01\0\0\0\x02\0\0\0"
    by_hand = (32).to_bytes(8, "little") + parent + (8).to_bytes(8, "little") + tokens
    assert page_digest(parent, [1, 2]) == sha256(by_hand).digest()


def test_a_salt_that_is_not_valid_unicode_is_still_a_salt():
    assert PrefixKey(salt="\ud800").root != PrefixKey(salt="\ud801").root


parts = st.tuples(st.text(max_size=3), st.text(max_size=3), st.binary(max_size=3), st.binary(max_size=3))


@given(one=parts, other=parts)
def test_the_key_is_injective(one, other):
    roots = [
        PrefixKey(tenant=tenant, salt=salt, base_digest=base, adapter_digest=adapter).root
        for tenant, salt, base, adapter in (one, other)
    ]
    assert (roots[0] == roots[1]) == (one == other)


pages = st.lists(st.tuples(*[st.integers(0, 2)] * G), min_size=1, max_size=4)


@given(one=pages, other=pages)
def test_page_digests_agree_exactly_as_far_as_the_tokens_do(one, other):
    chains = [PrefixChain(b"root", G), PrefixChain(b"root", G)]
    flat = [[token for page in side for token in page] for side in (one, other)]
    for place in range(min(len(one), len(other))):
        same = one[: place + 1] == other[: place + 1]
        assert (chains[0].digest(place, flat[0]) == chains[1].digest(place, flat[1])) == same


def test_a_chain_computes_each_digest_once():
    chain, tokens = PrefixChain(b"root", G), [1, 2, 3, 4]
    first = chain.digest(1, tokens)
    assert chain.digest(1, []) == first  # the tokens are not looked at again


def test_a_chain_refuses_a_page_that_is_not_full():
    with pytest.raises(AssertionError, match="not full"):
        PrefixChain(b"root", G).digest(1, [1, 2, 3])


def test_a_copied_chain_goes_its_own_way():
    chain = PrefixChain(b"root", G)
    chain.digest(0, [1, 2])
    twin = chain.copy()
    assert twin.digest(1, [1, 2, 3, 4]) != chain.digest(1, [1, 2, 5, 6])
    assert twin.digest(0, []) == chain.digest(0, [])


def test_the_last_token_is_never_found_in_the_cache():
    pool, chain = PagePool(4, G), PrefixChain(b"root", G)
    held = pool.alloc(2)
    for place, page in enumerate(held):
        pool.insert(page, chain.digest(place, [1, 2, 3, 4]))
    assert pool.longest_prefix(chain, [1, 2, 3, 4]) == held[:1]
    assert pool.longest_prefix(chain, [1, 2, 3, 4, 5]) == held


def test_a_prefix_ends_at_the_first_page_that_is_missing():
    pool, chain, tokens = PagePool(4, G), PrefixChain(b"root", G), [1, 2, 3, 4, 5, 6, 7]
    held = pool.alloc(3)
    for place in (0, 2):
        pool.insert(held[place], chain.digest(place, tokens))
    assert pool.longest_prefix(chain, tokens) == held[:1]


def test_an_index_holds_one_digest_per_page_and_one_page_per_digest():
    index = PrefixIndex()
    assert index.insert(3, b"a")
    assert not index.insert(3, b"b")
    assert not index.insert(4, b"a")
    index.remove(3)
    index.remove(3)
    assert (len(index), 3 in index, index.page(b"a")) == (0, False, None)


class PrefixMachine(RuleBasedStateMachine):
    """Two tenants, salts and adapters share a pool; the model remembers what each page stands for."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6, G)
        self.stands_for: dict[int, tuple] = {}
        self.version = {"math": 0, "law": 0}
        self.held: list[list[int]] = []

    @rule(
        tenant=st.sampled_from(["a", "ab"]),
        salt=st.sampled_from(["", "b"]),
        adapter=st.sampled_from([None, "math", "law"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        finite=st.booleans(),
    )
    def serve(self, tenant, salt, adapter, tokens, finite):
        """Looks the prompt up, computes what is missing, and indexes it if it came out finite."""
        content = b"%s@%d" % (adapter.encode(), self.version[adapter]) if adapter else b""
        chain = PrefixChain(PrefixKey(tenant=tenant, salt=salt, adapter_digest=content).root, G)
        hits = self.pool.longest_prefix(chain, tokens)
        names = [(tenant, salt, content, tuple(tokens[: end + G])) for end in range(0, len(tokens), G)]
        assert [self.stands_for[page] for page in hits] == names[: len(hits)]
        assert len(hits) * G < len(tokens)
        known = set(self.stands_for.values())
        cap = names[: (len(tokens) - 1) // G]
        assert len(hits) == len(cap) or cap[len(hits)] not in known  # nothing that could be hit is missed
        for page in hits:
            self.pool.share(page)
        fresh = self.pool.alloc(-(-len(tokens) // G) - len(hits))
        if fresh is None:
            self.pool.free(hits)
            return
        for page in fresh:
            self.stands_for.pop(page, None)
        self.held.append(hits + fresh)
        for place in range(len(hits), len(tokens) // G if finite else 0):
            if self.pool.insert(self.held[-1][place], chain.digest(place, tokens)):
                self.stands_for[self.held[-1][place]] = names[place]

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def end(self, which):
        self.pool.free(self.held.pop(which % len(self.held)))

    @rule(adapter=st.sampled_from(["math", "law"]))
    def republish(self, adapter):
        self.version[adapter] += 1

    @invariant()
    def the_pool_is_whole(self):
        self.pool.check(self.held)


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
