"""FreezeShifts: learned displacements stay where they are from here on.

What it does. Every shift layer that still learns its displacements stops. Rounded ones are fixed at their grid points,
and copies that met on one are summed. The output does not change.

When to use it, and when not. Half-way through a training, as Chen et al. do: the weights then settle on displacements
that no longer move. `Quantize` freezes rounded shifts by itself. Of several copies of a channel that met on one place,
all but one are left without weight, at free places, and training gives them weight again there: `PruneShifts`, which
fixes displacements too, takes them out for good.

Knobs. `include`, `exclude`: layers by name pattern.

Measured. ShiftResNet-20, expansion 6, on CIFAR-10 (`benchmarks/sparse_shift.py`): 20 epochs in which displacements
learn, then 20 frozen. With 62 % of them at zero 88.60 %, with 13 % (no pull) 89.10; without the second half 44 % at
zero cost 0.98 points.

Reference. Chen et al., "All You Need is a Few Shifts", CVPR 2019, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit, Keep
from compress.surgery import swap
from compress.task import Task, Work


@dataclass(frozen=True)
class FreezeShifts:
    """Settings of the stage; see the module's card."""

    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "substitute"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (Shift2d, ShiftConv2d)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        model, sites = swap(model, _frozen, self.kinds, self.include, self.exclude)
        return Edit(model, sites)


def _frozen(name: str, layer: nn.Module) -> nn.Module:
    assert isinstance(layer, Shift2d | ShiftConv2d)
    if not layer.learn:
        raise Keep("its displacements do not learn")
    layer.settle()
    layer.freeze()
    return layer
