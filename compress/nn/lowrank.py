"""Low-rank layers: a convolution or a linear layer as two to four thin ones, with nothing between them.

Tucker-2: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
ICLR 2016. Spatial: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014.
CP: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compress.nn.geometry import pair, spatial_config, unusual

FORMS = ("tucker", "spatial", "cp")


class LowRankConv2d(nn.Module):
    """Maps (N, in_channels, H, W) as the k x k convolution of the same geometry does, through `ranks` channels a group.

    `form` says through which parts; all of them have the groups, and only the last one the bias:

    tucker  `reduce` 1x1 to ranks[0], `core` k x k to ranks[1], `expand` 1x1. A rank that is a group's own number of
            channels needs no part: with ranks[0] = in_channels / groups this is the channel-wise SVD, with both it is
            the convolution.
    spatial `tall` k x 1 to ranks[0], `wide` 1 x k.
    cp      `reduce` 1x1 to ranks[0], `tall` k x 1 and `wide` 1 x k, each channel alone, `expand` 1x1.

    The stride is in the part that has the kernel, so a 1x1 convolution before it sees the whole input.

    Raises:
        ValueError: an unknown form; ranks of the wrong number, below 1, or (tucker) above a group's channels; channels
            that do not divide into groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        ranks: Sequence[int],
        form: str = "tucker",
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"`{name}` (={channels}) must be divisible by `groups` (={groups}).")
        if form not in FORMS:
            raise ValueError(f"`form` (={form!r}) must be one of {', '.join(FORMS)}.")
        whole = (in_channels // groups, out_channels // groups)
        number = len(whole) if form == "tucker" else 1
        if len(ranks) != number or any(rank < 1 for rank in ranks):
            raise ValueError(f"`ranks` (={list(ranks)}) must be {number} of 1 or more for the form {form}.")
        if form == "tucker" and any(rank > channels for rank, channels in zip(ranks, whole, strict=True)):
            raise ValueError(f"`ranks` (={list(ranks)}) must not exceed a group's channels, {list(whole)}.")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.form, self.ranks = form, tuple(ranks)
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.padding_mode = padding_mode
        self.parts = nn.Sequential()
        plan = self._plan()
        for name, channels, outputs, axes, of_groups in plan:
            has_bias = bias and name == plan[-1][0]
            self.parts.add_module(name, self._part(channels, outputs, axes, of_groups, has_bias))

    def _plan(self) -> list[tuple[str, int, int, tuple[int, ...], int]]:
        """Name, channels in and out, the axes along which the kernel reaches, groups; of each part."""
        g, first, last = self.groups, self.groups * self.ranks[0], self.groups * self.ranks[-1]
        reduce = ("reduce", self.in_channels, first, (), g)
        expand = ("expand", last, self.out_channels, (), g)
        if self.form == "spatial":
            return [("tall", self.in_channels, first, (0,), g), ("wide", first, self.out_channels, (1,), g)]
        if self.form == "cp":
            return [reduce, ("tall", first, first, (0,), first), ("wide", first, first, (1,), first), expand]
        core = ("core", first, last, (0, 1), g)
        return [part for part in (reduce, core, expand) if part is core or part[1] != part[2]]

    def _part(self, channels: int, outputs: int, axes: tuple[int, ...], groups: int, bias: bool) -> nn.Conv2d:
        """A convolution with this layer's geometry along `axes`, and pointwise along the others."""

        def along(values: tuple[int, int], otherwise: int) -> tuple[int, int]:
            return (values[0] if 0 in axes else otherwise, values[1] if 1 in axes else otherwise)

        if not axes:
            return nn.Conv2d(channels, outputs, 1, groups=groups, bias=bias)
        spatial: dict[str, Any] = {"stride": along(self.stride, 1), "dilation": along(self.dilation, 1)}
        spatial["padding"] = self.padding if isinstance(self.padding, str) else along(self.padding, 0)
        spatial["padding_mode"] = self.padding_mode
        return nn.Conv2d(channels, outputs, along(self.kernel_size, 1), groups=groups, bias=bias, **spatial)

    @property
    def output(self) -> nn.Conv2d:
        """The last part, which has the bias."""
        last = list(self.parts)[-1]
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts(x)
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "ranks": list(self.ranks),
            "form": self.form,
            "groups": self.groups,
            "bias": self.output.bias is not None,
            **spatial_config(self),
        }

    def extra_repr(self) -> str:
        kernel = "x".join(str(k) for k in self.kernel_size)
        ranks = "+".join(str(rank) for rank in self.ranks)
        return f"{self.in_channels}, {self.out_channels}, {kernel}, {self.form}, rank={ranks}" + unusual(self)


class LowRankLinear(nn.Module):
    """`reduce` to `rank` features, then `expand` to `out_features`, which has the bias: a linear layer of that rank.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` (={rank}) must be at least 1.")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.expand(self.reduce(x))
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        bias = self.expand.bias is not None
        return {"in_features": self.in_features, "out_features": self.out_features, "rank": self.rank, "bias": bias}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"
