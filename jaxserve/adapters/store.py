"""Adapters on the host: names, immutable versions, and which of them hold their weights in memory.

A name points at its newest version. Publishing other content under a name makes a new version and switches the name
in one step; whoever acquired an older version keeps it until released. Files are read and checked outside the lock.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxserve.adapters.fields import MAX_RANK, show
from jaxserve.adapters.peft_io import load_peft
from jaxserve.adapters.weights import ModelShape, Weights
from jaxserve.errors import AdapterError, AdapterNotFound, EngineError, InvalidRequest

NAME_PATTERN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")


@dataclass(frozen=True)
class AdapterVersion:
    """One published content of one name; equal to another when name, version and digest are."""

    name: str
    version: int  # 1, 2, ... per name, never used twice
    digest: bytes
    weights: Weights = field(compare=False, repr=False)
    path: Path | None = field(compare=False, default=None)  # None: only in memory

    @property
    def rank(self) -> int:
        return self.weights.rank


@dataclass(frozen=True)
class AdapterInfo:
    """A line of ``AdapterStore.list``."""

    name: str
    version: int
    digest: bytes
    method: str
    rank: int
    nbytes: int
    path: Path | None
    loaded: bool  # weights in host memory; otherwise read again when asked for
    pins: int  # acquired and not yet released, this version


@dataclass
class _Entry:
    info: AdapterInfo  # loaded and pins are filled in by list()
    version: AdapterVersion | None  # None: evicted


def _entry_of(version: AdapterVersion) -> _Entry:
    name, number, weights = version.name, version.version, version.weights
    return _Entry(
        AdapterInfo(name, number, version.digest, weights.method, weights.rank, weights.nbytes, version.path, True, 0),
        version,
    )


def check_name(name: str, base_names: Collection[str] = ()) -> None:
    """Raises InvalidRequest unless ``name`` can be an adapter's, beside a base model of these names."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(
            f"adapter name {show(name)} must be 1 to 64 letters, digits, '.', '_', '-', first a letter or digit", "name"
        )
    if name in base_names:
        raise InvalidRequest(f"adapter name {name!r} is the base model's", "name")


class AdapterStore:
    """Thread-safe host store of the adapters of one base model.

    At most ``max_host_adapters`` names hold weights in memory; above that the longest unused ones that nobody has
    acquired and that have a directory to come back from are dropped, and read again when asked for. At most
    ``max_adapters`` names exist.
    """

    def __init__(
        self,
        model: ModelShape,
        max_host_adapters: int = 512,
        *,
        max_adapters: int = 4096,
        max_rank: int = MAX_RANK,
        base_names: Collection[str] = (),
        base_digest: bytes | None = None,
        read: Callable[..., Weights] = load_peft,
    ):
        if max_host_adapters < 1 or max_adapters < max_host_adapters:
            raise ValueError(f"max_host_adapters {max_host_adapters} must be from 1 to max_adapters {max_adapters}")
        self._model, self._max_rank, self._base_digest, self._read = model, max_rank, base_digest, read
        self._max_host_adapters, self._max_adapters = max_host_adapters, max_adapters
        self._base_names = frozenset(base_names)
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._last_version: dict[str, int] = {}
        self._pins: dict[tuple[str, int], int] = {}

    def load(self, name: str, path: str | Path) -> AdapterVersion:
        """Reads the PEFT directory ``path`` and publishes it; the same content again is the same version.

        Raises:
          InvalidRequest: the name is malformed or the base model's.
          AdapterError: the directory is refused, or there is no room.
        """
        self.check_name(name)
        if not isinstance(path, str | os.PathLike):
            raise AdapterError(f"adapter {name!r}: path is {show(path)}; it must be that of a directory", "path")
        path = Path(path)
        return self._publish(name, self._read_weights(name, path), path)

    def put(self, name: str, weights: Weights, path: str | Path | None = None) -> AdapterVersion:
        """Publishes weights made here. Without a ``path`` they stay in memory until replaced. Raises as ``load``."""
        self.check_name(name)
        if weights.rank > self._max_rank:
            raise AdapterError(f"adapter {name!r}: rank {weights.rank} exceeds max_rank {self._max_rank}", "r")
        return self._publish(name, weights, None if path is None else Path(path))

    def get(self, name: str) -> AdapterVersion:
        """The newest version of ``name``, read from its directory again if it was evicted.

        Raises:
          AdapterNotFound: no such name.
          AdapterError: its directory is gone or holds something else by now, or there is no room.
        """
        while True:
            with self._lock:
                entry = self._use(name)
                if entry.version is not None:
                    return entry.version
                info = entry.info
            version = self._read_again(info)
            with self._lock:
                entry = self._entries.get(name)
                if entry is not None and entry.info.version == info.version:
                    if entry.version is None:
                        self._make_room()
                        entry.version = version
                    return entry.version
            # replaced or unloaded meanwhile: what holds now is the answer

    def unload(self, name: str) -> AdapterVersion | None:
        """Forgets ``name``; whoever acquired a version keeps it.

        Returns the version that was forgotten, None if its weights had been evicted. Raises AdapterNotFound.
        """
        with self._lock:
            version = self._use(name).version
            del self._entries[name]
            return version

    def list(self) -> list[AdapterInfo]:
        """The newest version of each name, sorted by name."""
        with self._lock:
            return [self._described(self._entries[name]) for name in sorted(self._entries)]

    def info(self, version: AdapterVersion) -> AdapterInfo:
        """What ``list`` says of a version while it is the newest of its name."""
        with self._lock:
            entry = self._entries.get(version.name)
            if entry is None or entry.info.version != version.version:  # unloaded or replaced meanwhile
                entry = _entry_of(version)
            return self._described(entry)

    def acquire(self, version: AdapterVersion) -> AdapterVersion:
        """Pins a version for one request, current or not; pair with ``release``."""
        key = (version.name, version.version)
        with self._lock:
            self._pins[key] = self._pins.get(key, 0) + 1
        return version

    def release(self, version: AdapterVersion) -> None:
        """Takes one ``acquire`` back. Raises EngineError if there is none."""
        key = (version.name, version.version)
        with self._lock:
            count = self._pins.get(key, 0)
            if count == 0:
                raise EngineError(f"adapter {version.name!r} version {version.version} released without being acquired")
            if count == 1:
                del self._pins[key]
            else:
                self._pins[key] = count - 1

    def pins(self, version: AdapterVersion) -> int:
        """How many acquisitions of this version are open."""
        with self._lock:
            return self._pins.get((version.name, version.version), 0)

    @property
    def num_pins(self) -> int:
        """How many acquisitions are open in all; 0 when no request runs."""
        with self._lock:
            return sum(self._pins.values())

    def check_name(self, name: str) -> None:
        """Raises InvalidRequest unless ``name`` can be an adapter's."""
        check_name(name, self._base_names)

    def _read_weights(self, name: str, path: Path) -> Weights:
        try:
            weights = self._read(path, self._model, max_rank=self._max_rank, base_digest=self._base_digest)
        except AdapterError as error:
            raise AdapterError(f"adapter {name!r}: {error}", error.field) from None
        weights.digest  # noqa: B018  computed here, where no lock is held
        return weights

    def _read_again(self, info: AdapterInfo) -> AdapterVersion:
        assert info.path is not None
        weights = self._read_weights(info.name, info.path)
        if weights.digest != info.digest:
            raise AdapterError(
                f"adapter {info.name!r}: its directory changed since version {info.version} was loaded; load it again",
                "digest",
            )
        return AdapterVersion(info.name, info.version, info.digest, weights, info.path)

    def _publish(self, name: str, weights: Weights, path: Path | None) -> AdapterVersion:
        digest = weights.digest
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and entry.info.digest == digest and entry.version is not None:
                self._entries.move_to_end(name)
                entry.info = replace(entry.info, path=path or entry.info.path)
                return entry.version
            if entry is None and len(self._entries) >= self._max_adapters:
                raise AdapterError(
                    f"adapter {name!r}: {self._max_adapters} adapters are loaded, unload one", "max_adapters"
                )
            if entry is None or entry.version is None:
                self._make_room()
            number = self._next_version(name, entry, digest)
            version = AdapterVersion(name, number, digest, weights, path)
            self._entries[name] = _entry_of(version)
            self._entries.move_to_end(name)
            self._last_version[name] = number
            return version

    def _next_version(self, name: str, entry: _Entry | None, digest: bytes) -> int:
        if entry is not None and entry.info.digest == digest:
            return entry.info.version  # evicted, and now loaded again
        return self._last_version.get(name, 0) + 1

    def _use(self, name: str) -> _Entry:
        if not isinstance(name, str) or name not in self._entries:
            raise AdapterNotFound(f"adapter {show(name)} is not loaded", "name")
        self._entries.move_to_end(name)
        return self._entries[name]

    def _make_room(self) -> None:
        """Leaves place for one more set of weights; called with the lock held."""
        held = [entry for entry in self._entries.values() if entry.version is not None]
        excess = len(held) - self._max_host_adapters + 1
        idle = [e for e in held if e.info.path is not None and (e.info.name, e.info.version) not in self._pins]
        if excess > len(idle):
            raise AdapterError(
                f"host store is full: max_host_adapters {self._max_host_adapters}, all of them in use or unsaved",
                "max_host_adapters",
            )
        for entry in idle[: max(excess, 0)]:
            entry.version = None

    def _described(self, entry: _Entry) -> AdapterInfo:
        info = entry.info
        pins = self._pins.get((info.name, info.version), 0)
        return AdapterInfo(**{**vars(info), "loaded": entry.version is not None, "pins": pins})
