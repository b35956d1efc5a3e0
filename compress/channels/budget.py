"""How many channels each group keeps, so that the network comes down to a budget with the least harm."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

from compress.allocate import Choice, share_out
from compress.channels.costs import Costs
from compress.channels.groups import ChannelGroup

SHARES = 8  # a group's harm is measured at so many steps from all its channels to the fewest


def allowed(group: ChannelGroup, multiple: int, floor: float, may_empty: bool = False) -> list[int]:
    """How many units may stay, rising: at least the floor (a share below 1, else a number of channels), and all.

    What is less than all has a multiple of `multiple` channels; with `may_empty` none of them may stay too.
    """
    each = group.width // group.units
    least = max(0 if may_empty else 1, math.ceil((floor * group.width if floor < 1 else floor) / each - 1e-9))
    return [n for n in range(least, group.units) if n * each % multiple == 0] + [group.units]


def levels(counts: Sequence[int]) -> list[int]:
    """About `SHARES` of the counts, the fewest among them, without the last."""
    steps = {round(i * (len(counts) - 1) / SHARES) for i in range(SHARES)}
    return [counts[i] for i in sorted(steps) if i < len(counts) - 1]


def between(measured: Mapping[int, float], units: int, left: int) -> float:
    """The harm with `left` units, on straight lines between what was measured; none with all `units`."""
    points = sorted({**measured, units: 0.0}.items())
    for (low, high_harm), (high, low_harm) in pairwise(points):
        if low <= left <= high:
            return low_harm + (high_harm - low_harm) * (high - left) / (high - low)
    return points[0][1]


def uniform(counts: Mapping[str, Sequence[int]], costs: Costs, budget: int) -> dict[str, int]:
    """The largest share that, kept in every group alike, fits into the budget, in steps of a thousandth."""

    def kept(share: int) -> dict[str, int]:
        chosen = {}
        for name, each in counts.items():
            fitting = [n for n in each if n <= share * each[-1] / 1000 + 1e-9]
            chosen[name] = fitting[-1] if fitting else each[0]
        return chosen

    low, high = 0, 1000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if costs.total(kept(middle)) <= budget else (low, middle - 1)
    return kept(low)


def by_harm(
    counts: Mapping[str, Sequence[int]], harms: Mapping[str, Mapping[int, float]], costs: Costs, budget: int
) -> dict[str, int]:
    """Kept units by group, so that the harms' sum is small and the cost fits into the budget.

    What a group's channels cost depends on the groups before and behind it, so the sum that is shared out, in which
    each counts as if the others were whole, is lowered until the real cost fits.
    """
    choices: dict[str, list[Choice]] = {}
    for name, each in counts.items():
        alone = [costs.total({name: n}) for n in each]
        choices[name] = [
            Choice(cost - alone[0], between(harms[name], each[-1], n)) for n, cost in zip(each, alone, strict=True)
        ]
    most = sum(choice[-1].cost for choice in choices.values())

    def kept(shared: int) -> dict[str, int]:
        taken = share_out(choices, shared)
        return {name: counts[name][index] for name, index in taken.items()}

    steps = 1 << 10
    grid = range(steps + 1)
    over = bisect_left(grid, True, key=lambda step: costs.total(kept(most * step // steps)) > budget)
    return filled(kept(most * max(over - 1, 0) // steps), counts, harms, costs, budget)


def filled(
    kept: dict[str, int],
    counts: Mapping[str, Sequence[int]],
    harms: Mapping[str, Mapping[int, float]],
    costs: Costs,
    budget: int,
) -> dict[str, int]:
    """`kept`, with what still fits into the budget added, where it takes away most harm first."""
    while True:
        best: tuple[float, dict[str, int]] | None = None
        for name, each in counts.items():
            at = each.index(kept[name])
            if at + 1 < len(each):
                more = {**kept, name: each[at + 1]}
                cost = costs.total(more) - costs.total(kept)
                harm = between(harms[name], each[-1], each[at]) - between(harms[name], each[-1], each[at + 1])
                if costs.total(more) <= budget and (best is None or harm / max(cost, 1) > best[0]):
                    best = harm / max(cost, 1), more
        if best is None:
            return kept
        kept = best[1]
