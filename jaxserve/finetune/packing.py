"""Puts several short examples into one window."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Bins of places in ``lengths`` whose sums are at most ``window``; a longer example has a bin of its own.

    First fit, longest first, equals in the given order: the bins are a function of the lengths and the window alone.
    Within a bin, and among bins by their first member, places rise.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        at = next((at for at, left in enumerate(room) if length <= left), None)
        if at is None:
            bins.append([place])
            room.append(max(0, window - length))
        else:
            bins[at].append(place)
            room[at] -= length
    return sorted(sorted(members) for members in bins)
