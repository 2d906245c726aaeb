"""The host store: names, versions, pins, eviction, and threads."""

import shutil
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_adapters import TINY, lora_config, write_adapter

from jaxserve.adapters import lora
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.adapters.store import AdapterStore
from jaxserve.adapters.weights import AdapterWeights
from jaxserve.errors import AdapterError, AdapterNotFound, EngineError, InvalidRequest


def weights(seed: int, rank: int = 4) -> AdapterWeights:
    config = lora_config(r=rank, lora_alpha=8, target_modules=["q_proj"])
    return lora.initial(config, TINY, np.random.default_rng(seed))


@pytest.fixture
def dirs(tmp_path):
    """Directory of adapter content number ``seed``."""

    def make(seed: int, **options):
        return write_adapter(tmp_path / f"{seed}{len(options)}", seed=seed, **options)

    return make


def infos(store):
    return {info.name: info for info in store.list()}


# ---- names and versions (L07)


def test_the_same_content_again_is_the_same_version_and_other_content_a_new_one(dirs):
    store = AdapterStore(TINY)
    first = store.load("math", dirs(1))
    assert (first.name, first.version, first.rank) == ("math", 1, 4)
    assert store.load("math", dirs(1)) is first
    second = store.load("math", dirs(2))
    assert second.version == 2
    assert second.digest != first.digest
    assert store.get("math") is second
    back = store.load("math", dirs(1))
    assert (back.version, back.digest) == (3, first.digest)


def test_version_numbers_are_not_used_again_after_unload(dirs):
    store = AdapterStore(TINY)
    store.load("math", dirs(1))
    store.unload("math")
    assert store.load("math", dirs(1)).version == 2


def test_weights_from_memory_are_published_like_files():
    store = AdapterStore(TINY)
    made = weights(0)
    version = store.put("job", made)
    assert store.get("job") is version
    assert version.weights is made
    assert version.path is None
    assert store.put("job", weights(0)) is version
    assert store.put("job", weights(1)).version == 2


def test_unknown_names_are_not_found(dirs):
    store = AdapterStore(TINY)
    for ask in (store.get, store.unload):
        with pytest.raises(AdapterNotFound, match="'math' is not loaded"):
            ask("math")
    store.load("math", dirs(1))
    store.unload("math")
    with pytest.raises(KeyError):
        store.get("math")


BAD_NAMES = [
    "",
    "../x",
    ".hidden",
    "-x",
    "_x",
    "a/b",
    "a b",
    "x" * 65,
    "ä",
    "a\n",
    "a\0",
    "A:b",
    "\ud800",
    None,
    3,
    ["a"],
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_malformed_names_are_refused_before_anything_is_read(name):
    store = AdapterStore(TINY, read=lambda *args, **options: pytest.fail("read"))
    for publish in (lambda: store.load(name, "somewhere"), lambda: store.put(name, weights(0))):
        with pytest.raises(InvalidRequest, match="1 to 64 letters") as caught:
            publish()
        assert caught.value.param == "name"


@pytest.mark.parametrize("name", ["a", "0", "A-b_c.d", "x" * 64])
def test_ordinary_names_are_accepted(name):
    assert AdapterStore(TINY).put(name, weights(0)).name == name


def test_the_base_models_name_is_refused(dirs):
    store = AdapterStore(TINY, base_names=["llama", "base"])
    with pytest.raises(InvalidRequest, match="base model's"):
        store.load("llama", dirs(1))
    assert store.list() == []


def test_a_refused_directory_changes_nothing_and_names_the_adapter(dirs):
    store = AdapterStore(TINY)
    first = store.load("math", dirs(1))
    bad = dirs(2)
    (bad / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"adapter 'math': adapter_config.json: peft_type") as caught:
        store.load("math", bad)
    assert caught.value.field == "peft_type"
    assert store.get("math") is first


@pytest.mark.parametrize("tensor", range(8))
def test_a_load_that_fails_at_any_tensor_leaves_name_and_version_unchanged(dirs, tensor):
    store = AdapterStore(TINY)
    first = store.load("math", dirs(1))
    import safetensors.numpy

    path = dirs(2) / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = sorted(tensors)[tensor]
    tensors[name] = np.full_like(tensors[name], np.nan)
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(AdapterError, match="NaN") as caught:
        store.load("math", path.parent)
    assert caught.value.field == name
    assert store.get("math") is first
    assert store.load("math", dirs(3)).version == 2


def test_ranks_above_the_limit_are_refused(dirs):
    store = AdapterStore(TINY, max_rank=8)
    with pytest.raises(AdapterError, match=r"rank 16 .*max_rank 8"):
        store.load("wide", dirs(1, r=16))
    with pytest.raises(AdapterError, match="rank 16 exceeds max_rank 8"):
        store.put("wide", weights(0, rank=16))
    store.put("narrow", weights(0, rank=8))


def test_the_base_digest_reaches_the_reader(tmp_path, dirs):
    from dataclasses import replace

    save_peft(replace(load_peft(dirs(1), TINY), base_digest=b"\x01"), tmp_path / "saved")
    assert AdapterStore(TINY, base_digest=b"\x01").load("a", tmp_path / "saved").version == 1
    with pytest.raises(AdapterError, match="base model"):
        AdapterStore(TINY, base_digest=b"\x02").load("a", tmp_path / "saved")


def test_the_list_says_what_is_there(dirs):
    store = AdapterStore(TINY)
    math = store.acquire(store.load("math", dirs(1)))
    store.put("art", weights(0))
    assert [info.name for info in store.list()] == ["art", "math"]
    info = infos(store)["math"]
    assert (info.version, info.digest, info.method, info.rank, info.loaded, info.pins) == (
        1,
        math.digest,
        "lora",
        4,
        True,
        1,
    )
    assert info.path == math.path
    assert info.nbytes == math.weights.nbytes


# ---- pins (A28, F28)


def test_a_version_is_described_as_it_was_published_when_others_unload_or_replace_it(dirs):
    store = AdapterStore(TINY)
    version = store.acquire(store.load("law", dirs(2)))
    assert store.info(version) == infos(store)["law"]
    published = store.info(version)
    store.load("law", dirs(3))
    assert store.info(version) == published
    store.unload("law")
    assert store.info(version) == published


def test_a_request_keeps_the_version_it_started_with(dirs):
    store = AdapterStore(TINY)
    first = store.acquire(store.load("math", dirs(1)))
    content = first.weights.digest
    second = store.load("math", dirs(2))
    store.unload("math")
    with pytest.raises(AdapterNotFound):
        store.get("math")
    assert store.pins(first) == 1
    assert first.weights.digest == content != second.digest
    store.release(first)
    assert store.num_pins == 0


def test_a_version_resolved_before_an_unload_can_still_be_acquired(dirs):
    store = AdapterStore(TINY)
    version = store.load("math", dirs(1))
    store.unload("math")
    assert store.acquire(version) is version
    store.release(version)
    assert store.num_pins == 0


def test_releasing_once_too_often_is_an_error(dirs):
    store = AdapterStore(TINY)
    version = store.load("math", dirs(1))
    with pytest.raises(EngineError, match="'math' version 1 released without being acquired"):
        store.release(version)
    store.acquire(version)
    store.acquire(version)
    store.release(version)
    store.release(version)
    with pytest.raises(EngineError):
        store.release(version)
    assert store.num_pins == 0


# ---- eviction


def test_the_longest_unused_leave_memory_and_come_back_when_asked_for(dirs):
    store = AdapterStore(TINY, max_host_adapters=2)
    a, b = store.load("a", dirs(1)), store.load("b", dirs(2))
    store.get("a")
    store.load("c", dirs(3))
    assert {name: info.loaded for name, info in infos(store).items()} == {"a": True, "b": False, "c": True}
    again = store.get("b")
    assert again == b
    assert again.weights.digest == b.digest
    assert not infos(store)["a"].loaded
    assert store.get("a") == a


def test_pinned_and_unsaved_adapters_are_never_evicted(dirs):
    store = AdapterStore(TINY, max_host_adapters=2)
    pinned = store.acquire(store.load("pinned", dirs(1)))
    store.put("unsaved", weights(0))
    with pytest.raises(AdapterError, match="host store is full: max_host_adapters 2") as caught:
        store.load("third", dirs(2))
    assert caught.value.field == "max_host_adapters"
    assert set(infos(store)) == {"pinned", "unsaved"}
    store.release(pinned)
    store.load("third", dirs(2))
    assert not infos(store)["pinned"].loaded
    assert infos(store)["unsaved"].loaded


def test_saved_weights_of_a_job_can_be_evicted(tmp_path):
    store = AdapterStore(TINY, max_host_adapters=1)
    made = weights(0)
    save_peft(made, tmp_path / "job")
    store.put("job", made, tmp_path / "job")
    store.put("other", weights(1))
    assert not infos(store)["job"].loaded


def test_the_same_content_from_another_directory_is_read_again_from_there(tmp_path):
    store = AdapterStore(TINY, max_host_adapters=1)
    for place in ("before", "after"):
        save_peft(weights(0), tmp_path / place)
    made = store.put("a", weights(0))
    assert store.load("a", tmp_path / "before") is store.load("a", tmp_path / "after") is made
    shutil.rmtree(tmp_path / "before")
    store.put("b", weights(1), tmp_path / "b")
    assert not infos(store)["a"].loaded
    assert store.get("a") == made


def test_a_new_version_of_a_held_name_needs_no_room(dirs):
    store = AdapterStore(TINY, max_host_adapters=1)
    for seed in range(5):
        store.acquire(store.put("job", weights(seed)))
    assert store.get("job").version == 5
    assert store.num_pins == 5


def test_a_directory_that_changed_or_went_after_eviction_is_an_error_until_loaded_again(tmp_path, dirs):
    store = AdapterStore(TINY, max_host_adapters=1)
    path = dirs(1)
    store.load("a", path)
    store.load("b", dirs(2))
    shutil.rmtree(path)
    with pytest.raises(AdapterError, match="does not exist"):
        store.get("a")
    write_adapter(path, seed=9)
    with pytest.raises(AdapterError, match="changed since version 1"):
        store.get("a")
    assert store.load("a", path).version == 2
    assert store.get("a").version == 2


def test_loading_evicted_content_again_is_still_the_same_version(dirs):
    store = AdapterStore(TINY, max_host_adapters=1)
    first = store.load("a", dirs(1))
    store.load("b", dirs(2))
    assert store.load("a", dirs(1)) == first


def test_the_number_of_names_is_limited(dirs):
    store = AdapterStore(TINY, max_host_adapters=2, max_adapters=3)
    for seed in range(3):
        store.load(f"a{seed}", dirs(seed))
    with pytest.raises(AdapterError, match="3 adapters are loaded") as caught:
        store.load("a3", dirs(3))
    assert caught.value.field == "max_adapters"
    store.load("a0", dirs(4))  # a name that is there
    store.unload("a1")
    store.load("a3", dirs(3))


def test_limits_that_make_no_sense_are_refused():
    for options in ({"max_host_adapters": 0}, {"max_host_adapters": 5, "max_adapters": 4}):
        with pytest.raises(ValueError, match="max_host_adapters"):
            AdapterStore(TINY, **options)


# ---- threads


class SlowReader:
    """Reads content by path name, and waits inside the read until told to go on."""

    def __init__(self):
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, path, model, **options):
        self.entered.set()
        assert self.go_on.wait(10)
        return weights(int(path.name))


def in_thread(work):
    result = []

    def run():
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, result


def test_a_slow_read_keeps_nobody_else_waiting():
    reader = SlowReader()
    store = AdapterStore(TINY, read=reader)
    ready = store.put("ready", weights(7))
    thread, result = in_thread(lambda: store.load("slow", "1"))
    assert reader.entered.wait(10)
    assert store.get("ready") is store.acquire(ready)
    store.release(ready)
    assert [info.name for info in store.list()] == ["ready"]
    reader.go_on.set()
    thread.join(10)
    assert result == [store.get("slow")]


@pytest.mark.parametrize("newer_is_evicted_too", [False, True])
def test_a_get_that_was_overtaken_answers_with_what_holds_now(newer_is_evicted_too):
    reader = SlowReader()
    reader.go_on.set()
    store = AdapterStore(TINY, max_host_adapters=1, read=reader)
    store.load("a", "1")
    store.load("b", "2")  # evicts a
    reader.go_on.clear()
    reader.entered.clear()
    thread, result = in_thread(lambda: store.get("a"))
    assert reader.entered.wait(10)
    newer = store.put("a", weights(5), "5")
    if newer_is_evicted_too:
        store.put("c", weights(3), "3")
    reader.go_on.set()
    thread.join(10)
    assert result == [newer]


def test_a_get_overtaken_by_an_unload_finds_nothing():
    reader = SlowReader()
    reader.go_on.set()
    store = AdapterStore(TINY, max_host_adapters=1, read=reader)
    store.load("a", "1")
    store.load("b", "2")
    reader.go_on.clear()
    reader.entered.clear()
    thread, result = in_thread(lambda: store.get("a"))
    assert reader.entered.wait(10)
    store.unload("a")
    reader.go_on.set()
    thread.join(10)
    assert isinstance(result[0], AdapterNotFound)


def test_threads_that_load_get_pin_and_unload_leave_no_pin_behind():
    made = [weights(seed) for seed in range(6)]
    store = AdapterStore(TINY, max_host_adapters=3, read=lambda path, model, **options: made[int(path.name)])
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(1500):
            name = f"a{rng.integers(4)}"
            try:
                version = store.acquire(
                    store.load(name, str(rng.integers(6))) if rng.random() < 0.3 else store.get(name)
                )
                try:
                    if rng.random() < 0.1:
                        store.unload(name)  # another thread may have been faster
                    if version.weights.digest != version.digest:
                        failures.append(version)
                finally:
                    store.release(version)
            except AdapterNotFound:
                pass
            except AdapterError as error:
                if error.field != "max_host_adapters":
                    failures.append(error)

    threads = [in_thread(lambda seed=seed: work(seed)) for seed in range(4)]
    for thread, result in threads:
        thread.join(60)
        assert result == [None]
    assert failures == []
    assert store.num_pins == 0
    assert sum(info.loaded for info in store.list()) <= 3


# ---- the state machine (P12)

CONTENT = [weights(seed) for seed in range(4)]
NAMES = st.sampled_from(["a", "b", "c"])
SEEDS = st.integers(0, len(CONTENT) - 1)


class StoreMachine(RuleBasedStateMachine):
    """Random publishing, unloading, requests that start and end; against a model of what must hold."""

    def __init__(self):
        super().__init__()
        self.store = AdapterStore(
            TINY, max_host_adapters=2, read=lambda path, model, **options: CONTENT[int(path.name)]
        )
        self.current: dict[str, tuple[int, bytes]] = {}
        self.last: dict[str, int] = {}
        self.running = []

    def published(self, name, seed, version):
        digest = CONTENT[seed].digest
        if self.current.get(name, (0, b""))[1] != digest:
            self.last[name] = self.last.get(name, 0) + 1
            self.current[name] = (self.last[name], digest)
        assert (version.version, version.digest) == self.current[name]

    def attempt(self, work):
        """None when the store says it has no room, which must then be true."""
        full = sum(info.loaded and (info.pins > 0 or info.path is None) for info in self.store.list()) >= 2
        try:
            return work()
        except AdapterError as error:
            if error.field == "max_host_adapters" and full:
                return None
            raise

    @rule(name=NAMES, seed=SEEDS)
    def load(self, name, seed):
        version = self.attempt(lambda: self.store.load(name, str(seed)))
        if version is not None:
            self.published(name, seed, version)

    @rule(name=NAMES, seed=SEEDS)
    def put(self, name, seed):
        version = self.attempt(lambda: self.store.put(name, CONTENT[seed]))
        if version is not None:
            self.published(name, seed, version)

    @rule(name=NAMES)
    def start(self, name):
        if name not in self.current:
            with pytest.raises(AdapterNotFound):
                self.store.get(name)
            return
        version = self.attempt(lambda: self.store.get(name))
        if version is not None:
            assert (version.version, version.digest) == self.current[name]
            self.running.append(self.store.acquire(version))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        version = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.store.release(version)

    @precondition(lambda self: self.running)
    @rule()
    def end_twice(self):
        version = self.running.pop()
        for _ in range(1 + self.running.count(version)):
            self.store.release(version)
        with pytest.raises(EngineError):
            self.store.release(version)
        self.running = [other for other in self.running if other != version]

    @rule(name=NAMES)
    def unload(self, name):
        if name in self.current:
            self.store.unload(name)
            del self.current[name]
        else:
            with pytest.raises(AdapterNotFound):
                self.store.unload(name)

    @invariant()
    def every_acquisition_is_counted_once_and_nothing_pinned_changes(self):
        assert self.store.num_pins == len(self.running)
        for version in self.running:
            assert self.store.pins(version) == self.running.count(version)
            assert version.weights.digest == version.digest

    @invariant()
    def names_point_at_their_newest_version_and_memory_is_bounded(self):
        listed = {info.name: (info.version, info.digest) for info in self.store.list()}
        assert listed == self.current
        assert sum(info.loaded for info in self.store.list()) <= 2


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
