"""Ranks under a budget for the whole network: what they cost in each layer, and which ones do the least harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compress.allocate import Choice, share_out
from compress.errors import ConfigError
from compress.lowrank.factors import Ranks, Shape
from compress.lowrank.harm import places
from compress.lowrank.ranks import allowed, best, costs
from compress.measure import counted
from compress.substitute import as_convolution

SHARES = [share / 20 for share in range(1, 20)]  # of a layer's own cost: what a budget chooses from


@dataclass(frozen=True)
class RankCosts:
    """What all choices of ranks of each layer cost, which of them it `may` have, and what it costs itself.

    `shapes` say what the choices are, and `total` is what the whole network costs.
    """

    shapes: Mapping[str, Shape]
    cost: Mapping[str, Tensor]
    may: Mapping[str, Tensor]
    own: Mapping[str, int]
    total: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        chosen: Mapping[str, nn.Module],
        method: str,
        unit: str,
        multiple: int,
        example: Tensor,
    ) -> RankCosts:
        """In `unit`: macs, params, or bytes (of parameters and buffers, as they are in memory)."""
        layers = {name: as_convolution(layer) for name, layer in chosen.items()}
        shapes = {name: Shape.of(layer, method) for name, layer in layers.items()}
        used = places(model, chosen, method, example) if unit == "macs" else {}
        cost, may, own = {}, {}, {}
        for name, shape in shapes.items():
            size = layers[name].weight.element_size() if unit == "bytes" else 1
            before, behind = used.get(name, (size, size))
            cost[name] = costs(shape, (before, behind))
            own[name] = behind * shape.weights
            may[name] = allowed(shape, multiple) & (cost[name] < own[name])
        return cls(shapes, cost, may, own, counted(model, example)[unit])

    @property
    def least(self) -> int:
        """What is left of the network at the lowest ranks."""
        return self._others + sum(map(self._lowest, self.own))

    @property
    def _others(self) -> int:
        return self.total - sum(self.own.values())

    def _lowest(self, name: str) -> int:
        may = self.may[name]
        return int(self.cost[name][may].min()) if bool(may.any()) else self.own[name]

    def require(self, setting: str, share: float) -> None:
        """Raise `ConfigError` for a share of the network that the lowest ranks do not reach."""
        if int(share * self.total) < self.least:
            closest = math.ceil(1000 * self.least / self.total) / 1000
            raise ConfigError(
                f"`{setting}` (={share}) must be at least {closest}: the lowest ranks leave so much of {self.total:,}."
            )

    def shared(self, harm: Mapping[str, Tensor], share: float) -> dict[str, Ranks | None]:
        """Ranks for each layer (None: as it is) that bring the network down to this share with the least harm.

        `harm` is that of all ranks of each layer, like `cost`.
        """
        ranks: dict[str, list[Ranks | None]] = {}
        choices: dict[str, list[Choice]] = {}
        for name, own in self.own.items():
            limits = [self._lowest(name), *(part * own for part in SHARES)]
            tables = self.shapes[name], -harm[name], self.cost[name], self.may[name]
            several = {best(*tables, limit) for limit in limits}
            ranks[name] = [None, *sorted(each for each in several if each is not None)]
            choices[name] = [Choice(own, 0.0)]
            for each in ranks[name][1:]:
                assert each is not None
                place = self.shapes[name].place(each)
                choices[name].append(Choice(int(self.cost[name][place]), float(harm[name][place])))
        taken = share_out(choices, max(int(share * self.total), self.least) - self._others)
        return {name: ranks[name][i] for name, i in taken.items()}
