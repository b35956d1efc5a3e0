"""An estimate of the energy of one inference, from published constants; nothing here is measured.

Constants: Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, 45 nm at 0.9 V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress.errors import UserError
from compress.measure.counts import Profile


@dataclass(frozen=True)
class EnergyTable:
    """What operations cost on a device, in picojoules. Another device is another table.

    `multiply_add` goes by operand bits: the multiplication, and the addition at the width of the accumulator. Memory
    is per 32 bits moved.
    """

    name: str
    multiply_add: Mapping[int, float]
    on_chip: float
    off_chip: float
    source: str
    second_hand: tuple[str, ...] = field(default=())


HOROWITZ_45NM = EnergyTable(
    name="45 nm, 0.9 V",
    # An int8 product (0.2) is accumulated in int32 (0.1); fp16: 1.1 + 0.4; fp32: 3.7 + 0.9.
    multiply_add={8: 0.2 + 0.1, 16: 1.1 + 0.4, 32: 3.7 + 0.9},
    on_chip=5.0,
    off_chip=640.0,
    source="Horowitz, ISSCC 2014; fp32, int32 addition and the 8 kB cache as reprinted in PMC8934428, table 3",
    second_hand=("int8 multiplication 0.2", "fp16 1.1 + 0.4", "DRAM 640 per 32 bits"),
)


@dataclass(frozen=True)
class Energy:
    """Estimated microjoules for one image, by what they are spent on."""

    arithmetic_uj: float
    weights_uj: float
    activations_uj: float
    shifts_uj: float
    table: str

    @property
    def total_uj(self) -> float:
        return self.arithmetic_uj + self.weights_uj + self.activations_uj + self.shifts_uj


def energy(
    profile: Profile, weight_bits: int = 32, activation_bits: int = 32, table: EnergyTable = HOROWITZ_45NM
) -> Energy:
    """Estimate the energy of one image at batch 1.

    Every multiply-add is done at the narrowest width of the table that holds both operands (zeros are not skipped);
    every weight is read once from off-chip memory; every output of a layer is written and read once on the chip; every
    element that a shift layer displaces is read and written once more. Control, instruction fetch and idle power are
    left out, so ratios between models say more than the figure itself.

    Raises:
        UserError: a width that is not positive or wider than any in the table.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if not 1 <= bits <= max(table.multiply_add):
            raise UserError(f"`{name}` (={bits}) must lie between 1 and {max(table.multiply_add)}, the table's widest.")
    operand = min(width for width in table.multiply_add if width >= max(weight_bits, activation_bits))
    activation_words = profile.activation_bytes / 4 * activation_bits / 32
    return Energy(
        arithmetic_uj=1e-6 * profile.macs * table.multiply_add[operand],
        weights_uj=1e-6 * profile.params * weight_bits / 32 * table.off_chip,
        activations_uj=1e-6 * 2 * activation_words * table.on_chip,
        shifts_uj=1e-6 * 2 * profile.shift_elements * activation_bits / 32 * table.on_chip,
        table=table.name,
    )
