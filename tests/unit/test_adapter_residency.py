"""The bank's page table: who is resident, who waits, and that nothing is lost."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.adapters.residency import Residency, num_pages_of
from jaxserve.errors import EngineError


@dataclass(frozen=True)
class FakeVersion:
    """What the page table looks at."""

    name: str
    rank: int = 8
    version: int = 1

    @property
    def digest(self) -> bytes:
        return f"{self.name} {self.version} {self.rank}".encode()


class Bank:
    """Remembers what was written to which page; fails on request."""

    def __init__(self):
        self.pages, self.uploads, self.fail = {}, 0, False

    def __call__(self, version, pages):
        self.uploads += 1
        for index, page in enumerate(pages):
            self.pages[page] = (version.digest, index)
            if self.fail:
                raise RuntimeError("device lost")


def make(num_pages):
    bank = Bank()
    return Residency(num_pages, bank), bank


A, B, C, D = (FakeVersion(name) for name in "abcd")
WIDE = FakeVersion("wide", rank=40)


@pytest.mark.parametrize(("rank", "pages"), [(0, 1), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3), (256, 16)])
def test_an_adapter_takes_its_rank_in_pages(rank, pages):
    version = FakeVersion("x", rank)
    assert num_pages_of(version) == pages
    residency, bank = make(pages + 1)
    assert residency.fits(version)
    assert residency.try_acquire(version)
    assert len(residency.pages_of(version)) == pages
    assert [bank.pages[page] for page in residency.pages_of(version)] == [(version.digest, i) for i in range(pages)]
    assert not make(pages)[0].fits(version)


def test_the_base_is_always_resident_and_takes_no_page():
    residency, bank = make(1)
    assert residency.fits(None)
    assert residency.try_acquire(None)
    residency.release(None)
    residency.release(None)
    assert residency.pages_of(None) == ()
    assert bank.uploads == 0
    residency.check()


def test_page_zero_is_never_given_away():
    residency, _ = make(6)
    for version in (A, B, WIDE):
        assert residency.try_acquire(version)
        assert 0 not in residency.pages_of(version)
    assert residency.counts().num_free == 0


def test_a_resident_version_is_uploaded_once_and_counted_per_acquisition():
    residency, bank = make(3)
    assert residency.try_acquire(A)
    assert residency.try_acquire(A)
    assert bank.uploads == 1
    assert residency.counts().num_refs == 2
    residency.release(A)
    residency.release(A)
    assert residency.counts().num_pinned == 0
    assert residency.try_acquire(A)
    assert bank.uploads == 1


def test_the_longest_unused_unpinned_version_leaves_first():
    residency, _ = make(4)
    for version in (A, B, C):
        residency.try_acquire(version)
        residency.release(version)
    residency.try_acquire(A)
    residency.release(A)
    assert residency.try_acquire(D)
    assert [version.name for version in residency.resident()] == ["c", "a", "d"]


def test_pinned_versions_stay_and_nobody_leaves_in_vain():
    residency, bank = make(4)
    residency.try_acquire(A)
    residency.try_acquire(B)
    residency.release(B)
    before = residency.counts()
    assert not residency.try_acquire(WIDE)  # three pages; only two could be had
    assert residency.counts() == before
    assert bank.uploads == 2
    residency.release(A)
    assert residency.try_acquire(WIDE)
    assert residency.resident() == [WIDE]


def test_two_names_of_the_same_content_share_pages():
    class Twin(FakeVersion):
        @property
        def digest(self):
            return A.digest

    residency, bank = make(2)
    assert residency.try_acquire(A)
    assert residency.try_acquire(Twin("twin"))
    assert bank.uploads == 1
    residency.release(Twin("twin"))
    residency.release(A)
    assert residency.counts().num_refs == 0


def test_an_upload_that_fails_leaves_nothing_allocated():
    residency, bank = make(4)
    bank.fail = True
    for _ in range(5):
        with pytest.raises(RuntimeError, match="device lost"):
            residency.try_acquire(WIDE)
        residency.check()
        assert residency.counts().num_free == 3
    with pytest.raises(EngineError):
        residency.release(WIDE)
    bank.fail = False
    assert residency.try_acquire(WIDE)


def test_releasing_once_too_often_is_an_error():
    residency, _ = make(3)
    with pytest.raises(EngineError, match="'a' version 1 released without being acquired"):
        residency.release(A)
    residency.try_acquire(A)
    residency.release(A)
    with pytest.raises(EngineError):
        residency.release(A)
    residency.check()


def test_a_dropped_version_is_freed_at_once_or_at_its_last_release():
    residency, _ = make(3)
    residency.try_acquire(A)
    residency.release(A)
    residency.drop(A)
    assert residency.resident() == []
    residency.try_acquire(B)
    residency.try_acquire(B)
    residency.drop(B)
    residency.drop(B)
    pages = residency.pages_of(B)
    residency.release(B)
    assert residency.pages_of(B) == pages
    residency.check()
    residency.release(B)
    assert residency.resident() == []
    assert residency.counts().num_free == 2
    residency.drop(C)  # never resident


def test_a_dropped_version_that_still_runs_can_be_acquired_by_a_queued_request():
    residency, bank = make(2)
    residency.try_acquire(A)
    residency.drop(A)
    assert residency.try_acquire(A)
    assert bank.uploads == 1
    residency.release(A)
    residency.release(A)
    assert residency.resident() == []


def test_pages_of_a_version_that_is_not_resident_is_an_error():
    residency, _ = make(3)
    with pytest.raises(EngineError, match="not in the bank"):
        residency.pages_of(A)


def test_a_broken_table_is_noticed():
    residency, _ = make(3)
    residency.try_acquire(A)
    residency.check()
    residency._free.append(residency.pages_of(A)[0])
    with pytest.raises(EngineError, match="free and used pages"):
        residency.check()


def test_a_bank_without_page_zero_is_refused():
    with pytest.raises(ValueError, match="num_pages 0"):
        make(0)


# ---- the state machine (P7, P12)

VERSIONS = st.builds(FakeVersion, st.sampled_from("abcd"), st.sampled_from([4, 16, 20, 48, 100]), st.integers(1, 2))
NUM_PAGES = 7


class ResidencyMachine(RuleBasedStateMachine):
    """Requests of many adapters that start, end, fail to upload and are dropped, in any order."""

    def __init__(self):
        super().__init__()
        self.residency, self.bank = make(NUM_PAGES)
        self.running = []
        self.dropped = set()

    def pinned_pages(self):
        return sum(num_pages_of(version) for version in set(self.running))

    @rule(version=VERSIONS)
    def acquire(self, version):
        expected = version in self.running or self.pinned_pages() + num_pages_of(version) < NUM_PAGES
        assert self.residency.try_acquire(version) == expected
        if expected:
            self.running.append(version)
        else:
            with pytest.raises(EngineError):
                self.residency.release(version)

    @rule(version=VERSIONS)
    def acquire_while_the_device_fails(self, version):
        if version in self.running or version in self.residency.resident():
            return
        before, self.bank.fail = self.residency.counts(), True
        try:
            assert not self.residency.try_acquire(version)
            assert self.residency.counts() == before
        except RuntimeError:
            assert self.residency.counts().num_refs == before.num_refs
        finally:
            self.bank.fail = False
        assert version not in self.residency.resident()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data):
        version = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.residency.release(version)
        if version in self.dropped and version not in self.running:
            assert version not in self.residency.resident()
            self.dropped.remove(version)

    @rule(version=VERSIONS)
    def drop(self, version):
        self.residency.drop(version)
        if version in self.running:
            self.dropped.add(version)
        else:
            assert version not in self.residency.resident()

    @invariant()
    def every_page_has_one_place_and_every_acquisition_is_counted(self):
        self.residency.check()
        counts = self.residency.counts()
        assert counts.num_free + counts.num_used == counts.num_pages == NUM_PAGES - 1
        assert counts.num_refs == len(self.running)
        assert counts.num_pinned == len(set(self.running))

    @invariant()
    def every_resident_version_finds_its_own_content_in_its_pages(self):
        assert set(self.running) <= set(self.residency.resident())
        for version in self.residency.resident():
            content = [self.bank.pages[page] for page in self.residency.pages_of(version)]
            assert content == [(version.digest, index) for index in range(num_pages_of(version))]


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
