"""Weights that share a few values: each weight is a place in a table that its layer has.

Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and Huffman Coding",
ICLR 2016, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

LARGEST = 256  # entries: an index fits a byte


class ClusteredWeight(nn.Module):
    """A parametrization: indices become values of the `table`, times one gain for each output channel (axis 0).

    What the layer stores in place of its weight is the index of each, whole numbers 0 .. entries - 1 in float. It gets
    no gradient, so training never leaves the table; a checkpoint packs it into the bits that it needs. What is trained
    is the table: the gradient of an entry is the sum of those of its weights.

    With `zero`, index 0 is exactly zero, always, and no entry of the table: pruned weights stay pruned. A mask that
    stands in front multiplies the indices; what it masks has index 0, so it is zero here too.

    Assigning to the weight can only scale channels, which sets `gain`: batch norm is folded so. `weights` says how many
    weights share the table, zeros aside. A step moves an entry by the mean of the steps that its weights would have
    taken, where they are spread evenly over the entries: shared weights then train at a learning rate at which free
    ones do. That is for SGD; optimizers that see no sizes of gradients hardly move the table of a large layer.

    Raises:
        ValueError: no entry but zero, more than 256 entries, or sizes below 1.
    """

    gain: Tensor

    def __init__(self, entries: int, channels: int, weights: int, zero: bool = False) -> None:
        super().__init__()
        least = 2 if zero else 1
        if not least <= entries <= LARGEST:
            raise ValueError(f"`entries` (={entries}) must be between {least} and {LARGEST}: an index fits a byte.")
        for name, size in (("channels", channels), ("weights", weights)):
            if size < 1:
                raise ValueError(f"`{name}` (={size}) must be at least 1.")
        self.entries, self.channels, self.weights, self.zero = entries, channels, weights, zero
        self.table = nn.Parameter(torch.zeros(entries - zero))
        self.register_buffer("gain", torch.ones(channels))
        self._index: tuple[Tensor, ...] = ()  # what forward saw last, for `right_inverse`

    def values(self) -> Tensor:
        """What an index stands for, (entries,): the table, behind a zero where there is `zero`."""
        return F.pad(self.table, (1, 0)) if self.zero else self.table

    def forward(self, index: Tensor) -> Tensor:
        index = index.detach()
        if not torch.compiler.is_compiling():
            self._index = (index,)
        return self._looked_up(index) * self.gain.view(-1, *[1] * (index.dim() - 1))

    def _looked_up(self, index: Tensor) -> Tensor:
        # In double precision, whose gradients torch sums in a fixed order on several threads too; what is no index
        # (a weight that has not been given one yet) is taken for the nearest.
        places = index.long().clamp(0, self.entries - 1)
        return self.values().double()[places].to(self.table.dtype)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """The indices as they are, where `weight` is what they gave last with every channel times a factor.

        Raises:
            NotImplementedError: it is anything else.
        """
        if self._index and self._index[0].shape == weight.shape:
            (index,) = self._index
            table, wanted = self._looked_up(index).flatten(1).double(), weight.flatten(1).double()
            squares = table.square().sum(1)
            gain = torch.where(squares > 0, (wanted * table).sum(1) / squares, self.gain.double())
            if torch.allclose(gain.unsqueeze(1) * table, wanted, rtol=1e-5, atol=1e-8):
                self.gain.copy_(gain)
                return index.clone()
        raise NotImplementedError(
            "weights that share a table can only be scaled, by one factor for each output channel; for other values "
            "remove the parametrization first."
        )

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """How an optimizer has to treat the table: by the mean over the weights of an entry, and without decay."""
        return {"table": {"lr_scale": self.table.numel() / self.weights, "weight_decay": 0.0}}

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"entries": self.entries, "channels": self.channels, "weights": self.weights, "zero": self.zero}

    def extra_repr(self) -> str:
        return f"entries={self.entries}, channels={self.channels}" + (", zero" if self.zero else "")


@torch.no_grad()
def share_weight(layer: nn.Module, table: Tensor) -> ClusteredWeight:
    """Put each weight of a `Conv2d` or `Linear` on the nearest value of `table` (ascending), and exact zeros on zero.

    The layer's weight is parametrized from then on; masks that it has stay in front.

    Raises:
        ValueError: the weight is computed by something that indices do not pass unchanged.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    zeros = weight == 0
    zero = bool(zeros.any())
    indices = nearest(weight, table) + zero
    indices = torch.where(zeros, 0, indices).to(weight.dtype)
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations.weight  # type: ignore[union-attr]  # a ModuleDict, as it is parametrized
        if not chain.is_tensor or not all(torch.equal(part(indices), indices) for part in chain):  # type: ignore[union-attr]  # likewise
            kinds = ", ".join(type(part).__name__ for part in chain)  # type: ignore[union-attr]  # likewise
            raise ValueError(f"`layer` has a weight computed by {kinds}, which indices do not pass unchanged.")
    codebook = ClusteredWeight(len(table) + zero, len(weight), max(1, int((~zeros).sum())), zero).to(weight)
    codebook.table.copy_(table)
    parametrize.register_parametrization(layer, "weight", codebook)
    original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]  # as above
    original.requires_grad_(False).copy_(indices)
    return codebook


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """For each of the values the place of the nearest number of `table` (ascending); half-way it is the upper one."""
    table = table.double()
    return torch.bucketize(values.detach().double(), (table[1:] + table[:-1]) / 2, right=True)
