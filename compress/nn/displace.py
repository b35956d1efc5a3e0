"""The shift layer that stands alone: every channel is displaced by its own vector, and nothing is mixed.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018: fixed, whole pixels.
Jeon & Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018: learned, bilinear.
Chen et al., "All You Need is a Few Shifts", CVPR 2019: learned, rounded with a straight-through gradient, L1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.nn.displacement import bilinear_kernel, displace
from compress.nn.plain_shift import displacement_forms
from compress.nn.shift import LARGEST_KERNEL, LEARNING_RATE_SCALE
from compress.nn.taps import pull, round_half_away

STARTS = ("grouped", "random", "uniform")
BILINEAR_MACS = 4  # for each output element: its four neighbours, each times a weight


class Shift2d(nn.Module):
    """Displaces every channel by its own (dy, dx) pixels, zeros outside, and takes every `stride`-th position.

    Maps (N, channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)). Displacements stay inside the window
    of `kernel_size` (times `dilation`): 3 for one pixel each way, 15 for seven. They are computed as a depthwise
    convolution just wide enough for the largest of them, so a wide window costs time only when it is used.

    `start`: "grouped" gives channel c the window position c modulo k * k, row by row, and leaves the channels beyond
    the last whole k * k where they are (Wu et al.'s kernel); "random" draws whole pixels inside the window; "uniform"
    draws real numbers in [-1, 1] (Jeon & Kim).

    `displacement` is (channels, 2) in (y, x): a parameter with `learn`, else a buffer. With `quantize` it is rounded
    in every forward pass; `l1` is the weight of its L1 norm in the loss. `normalize` gives the gradient of each
    displacement length 1, `lr_scale` is their learning rate as a share of the weights'; Chen et al. use False and 1.

    Raises:
        ValueError: an even kernel, a window wider than 255, an unknown `start`, or sizes below 1.
    """

    displacement: Tensor

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        start: str = "grouped",
        learn: bool = False,
        quantize: bool = True,
        l1: float = 0.0,
        normalize: bool = True,
        lr_scale: float = LEARNING_RATE_SCALE,
        lattice_decay: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("stride", stride), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"`{name}` (={value}) must be at least 1.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` (={kernel_size}) must be odd, so that it has a centre.")
        if (kernel_size - 1) * dilation + 1 > LARGEST_KERNEL:
            raise ValueError(
                f"`kernel_size` (={kernel_size}) with `dilation` (={dilation}) must not be wider than {LARGEST_KERNEL}."
            )
        if start not in STARTS:
            raise ValueError(f"`start` (={start!r}) must be one of {', '.join(STARTS)}.")
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        self.start, self.learn, self.quantize, self.l1 = start, learn, quantize, l1
        self.normalize, self.lr_scale, self.lattice_decay = normalize, lr_scale, lattice_decay
        if learn:
            self.displacement = nn.Parameter(self._first())
        else:
            self.register_buffer("displacement", self._first())

    def _first(self) -> Tensor:
        k = self.kernel_size
        if self.start == "uniform":
            return (torch.rand(self.channels, 2) * 2 - 1) * min(1, self.reach)
        if self.start == "random":
            return (torch.randint(k, (self.channels, 2)) - k // 2).float() * self.dilation
        c = torch.arange(self.channels)
        place = torch.stack((c // k % k, c % k), -1) - k // 2
        grouped = self.channels // (k * k) * (k * k)
        return torch.where((c < grouped).unsqueeze(-1), place, 0).float() * self.dilation

    @property
    def reach(self) -> int:
        """The largest displacement along each axis, in pixels."""
        return self.kernel_size // 2 * self.dilation

    @property
    def integer(self) -> bool:
        """Whether forward moves by whole pixels, so that every output is one of the inputs, or zero."""
        return self.quantize or bool((self.displacement == round_half_away(self.displacement)).all())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.learn:
            self._clamp()
        inside = self.displacement.clamp(-self.reach, self.reach)
        return displace(x, inside, self.stride, self.quantize, self.normalize, self.reach)

    @torch.no_grad()
    def _clamp(self) -> None:
        """Keep displacements inside the window, so that one which was pushed out finds its way back.

        Through `data`: autograd may hold the displacements since a call before, which changed what there was to change.
        """
        self.displacement.data.clamp_(-self.reach, self.reach)

    def settle(self) -> None:
        """Fix rounded displacements and stop learning them; the output does not change.

        A layer that does not round is left alone.
        """
        if self.quantize:
            self._clamp()
            with torch.no_grad():
                self.displacement.copy_(round_half_away(self.displacement))
            self.freeze()

    def freeze(self) -> None:
        """Stop learning the displacements, which stay where they are."""
        fixed = self.displacement.detach().clone()
        del self.displacement
        self.register_buffer("displacement", fixed)
        self.learn = False

    def penalty(self) -> Tensor:
        """What the layer adds to the training loss while its displacements learn, see `pull`.

        With `normalize` the gradient from the images has length 1 for each displacement, and `l1` is the pull's
        strength beside it.
        """
        return pull(self.displacement, self.l1, self.lattice_decay) if self.learn else self.displacement.new_zeros(())

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """How an optimizer has to treat parameters of this layer: displacements at their own pace, without decay."""
        return {"displacement": {"lr_scale": self.lr_scale, "weight_decay": 0.0}} if self.learn else {}

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("channels", "kernel_size", "stride", "dilation", "start", "learn", "quantize", "l1")
        return {name: getattr(self, name) for name in (*names, "normalize", "lr_scale", "lattice_decay")}

    def macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-adds for one image of `input_shape` (N, C, H, W): none for whole pixels, else 4 an output element.

        That is the work of the operation; the depthwise convolution that computes it does more where it is wider.
        """
        if self.integer:
            return 0
        height, width = (-(-size // self.stride) for size in input_shape[-2:])
        return BILINEAR_MACS * self.channels * height * width

    def forms(self, target: str) -> dict[str, nn.Module]:
        """The same function in plain torch modules, in every form that there is for `target`, the default first.

        A depthwise convolution, one-hot where it moves by whole pixels; the same for the channels that move only;
        nothing at all where none does.
        """
        used = self.displacement.detach().clamp(-self.reach, self.reach)
        kernel = bilinear_kernel(round_half_away(used) if self.quantize else used)
        return {name: form.train(self.training) for name, form in displacement_forms(kernel, self.stride).items()}

    def lower(self, target: str) -> nn.Module:
        """The default of `forms`."""
        return next(iter(self.forms(target).values()))

    def extra_repr(self) -> str:
        text = f"{self.channels}, {self.kernel_size}x{self.kernel_size}"
        for name, value in (("stride", self.stride), ("dilation", self.dilation)):
            if value != 1:
                text += f", {name}={value}"
        kind = "whole pixels" if self.integer else "bilinear"
        return f"{text}, {kind}" + (", learned" if self.learn else "")


class ShiftPool2d(nn.Module):
    """A whole-pixel shift, then the average over 2x2: a strided shift by half pixels, in integers.

    Maps (N, channels, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)). `pad` is (rows, columns) of zeros
    below and on the right: 1 where the last window would reach past the edge, which is so for odd sizes at stride 2.
    Without it such maps lose their last row or column.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int, dilation: int, pad: tuple[int, int]) -> None:
        super().__init__()
        self.stride, self.pads = stride, (int(pad[0]), int(pad[1]))
        self.shift = Shift2d(channels, kernel_size, dilation=dilation)
        self.pad = nn.ZeroPad2d((0, self.pads[1], 0, self.pads[0])) if any(self.pads) else nn.Identity()
        self.pool = nn.AvgPool2d(2, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.shift(self.pad(x)))  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        shift = self.shift
        return {
            "channels": shift.channels,
            "kernel_size": shift.kernel_size,
            "stride": self.stride,
            "dilation": shift.dilation,
            "pad": list(self.pads),
        }

    def extra_repr(self) -> str:
        return f"{self.shift.extra_repr()}, stride={self.stride}"
