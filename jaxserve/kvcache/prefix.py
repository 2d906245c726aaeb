"""Names a page by everything its keys and values depend on, so that equal names mean equal contents.

Shapes: G tokens per page.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256


@dataclass(frozen=True, kw_only=True)
class PrefixKey:
    """What, besides the tokens, decides the keys and values of a page: never the adapter's name, always its content."""

    tenant: str = ""
    salt: str = ""
    base_digest: bytes = b""
    adapter_digest: bytes = b""

    @property
    def root(self) -> bytes:
        """The parent digest of a sequence's first page."""
        return _digest(_utf8(self.tenant), _utf8(self.salt), self.base_digest, self.adapter_digest)


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full page: its tokens (int32) after everything that ``parent`` stands for."""
    return sha256(_page(len(parent), len(tokens)).pack(len(parent), parent, 4 * len(tokens), *tokens)).digest()


class PrefixChain:
    """The page digests of one growing sequence, each computed once."""

    def __init__(self, root: bytes, page_size: int):
        self.page_size = page_size
        self._digests = [root]

    def digest(self, place: int, tokens: Sequence[int]) -> bytes:
        """Digest of the sequence's page number ``place``; ``tokens`` must reach its end."""
        known, size = self._digests, self.page_size
        if place + 1 >= len(known):
            assert (place + 1) * size <= len(tokens), f"page {place} is not full of known tokens"
            for start in range((len(known) - 1) * size, (place + 1) * size, size):
                known.append(page_digest(known[-1], tokens[start : start + size]))
        return known[place + 1]

    def copy(self) -> "PrefixChain":
        """A chain that goes its own way from here."""
        twin = PrefixChain(self._digests[0], self.page_size)
        twin._digests = self._digests.copy()
        return twin


class PrefixIndex:
    """One page per digest, one digest per page."""

    def __init__(self):
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, page: int) -> bool:
        return page in self._digest_of

    def page(self, digest: bytes) -> int | None:
        return self._page_of.get(digest)

    def insert(self, page: int, digest: bytes) -> bool:
        """Names ``page``; False when it has a name or the name is taken: the older page then stays the known one."""
        if digest in self._page_of or page in self._digest_of:
            return False
        self._page_of[digest] = page
        self._digest_of[page] = digest
        return True

    def remove(self, page: int) -> None:
        """Forgets the page's name, if it has one."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]


@lru_cache
def _page(parent_bytes: int, num_tokens: int) -> struct.Struct:
    """What ``_digest`` joins of a parent and a page's tokens, in one call."""
    return struct.Struct(f"<Q{parent_bytes}sQ{num_tokens}i")


def _digest(*parts: bytes) -> bytes:
    """Length-prefixed, so that no two different lists of parts are ever hashed as the same bytes."""
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
