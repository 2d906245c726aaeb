"""Puts several short examples into one window."""

from collections import defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush


def pack(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Bins of places in ``lengths`` whose sums are at most ``window``; a longer example has a bin of its own.

    First fit, longest first, equals in the given order: the bins are a function of the lengths and the window alone.
    Within a bin, and among bins by their first member, places rise.
    """
    bins: list[list[int]] = []
    with_room = defaultdict[int, list[int]](list)  # heaps of bins, by the room they have
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        _, room = min(((heap[0], room) for room, heap in with_room.items() if heap and length <= room), default=(0, 0))
        if room:
            at = heappop(with_room[room])
            bins[at].append(place)
        else:
            at, room = len(bins), max(window, length)
            bins.append([place])
        heappush(with_room[room - length], at)
    return sorted(sorted(members) for members in bins)
