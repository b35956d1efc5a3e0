"""Convolution by shifts: a few displaced copies of each input channel, then a pointwise convolution.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018: fixed displacements.
Jeon & Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018: learned, bilinear.
Chen et al., "All You Need is a Few Shifts", CVPR 2019: rounded with a straight-through gradient, L1 towards zero.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.nn.displacement import displace
from compress.nn.geometry import pair, spatial_config, unusual
from compress.nn.plain_shift import around, convolution_forms
from compress.nn.taps import pull, round_half_away, taps, window

LARGEST_KERNEL = 255  # displacements fit a byte
LEARNING_RATE_SCALE = 0.01  # of displacements, as in every prototxt of Jeon & Kim


class ShiftConv2d(nn.Module):
    """`taps` displaced copies of each input channel, then one pointwise convolution over all copies.

    Maps (N, in_channels, H, W) as the k x k convolution of the same stride, padding, dilation and groups does. It is
    that convolution with at most `taps` non-zero positions for each input channel, and is computed so: the pointwise
    weights and the displacements are composed into one dense kernel, which trains as fast as the convolution. One copy
    that does not learn is moved by itself instead, by a depthwise convolution or, on a GPU, by kernels of our own.

    `displacement` is (in_channels, taps, 2) in (y, x), see `taps`. Column `c * taps + t` of `pointwise.weight` belongs
    to copy t of input channel c. With `learn` the displacements are trained, with `quantize` they are rounded in every
    forward pass, `l1` is the weight of their L1 norm in the loss. `normalize` gives the gradient of each displacement
    length 1, and `lr_scale` is their learning rate as a share of the weights'; Chen et al. use False and 1.

    Raises:
        ValueError: more taps than the kernel has positions, or none; a kernel wider than 255; groups, padding or stride
            that no convolution has.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        taps: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        learn: bool = False,
        quantize: bool = True,
        l1: float = 0.0,
        normalize: bool = True,
        lr_scale: float = LEARNING_RATE_SCALE,
        lattice_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.kernel_size = pair(kernel_size)
        positions = math.prod(self.kernel_size)
        if not all(1 <= size <= LARGEST_KERNEL for size in self.kernel_size):
            raise ValueError(
                f"`kernel_size` (={self.kernel_size}) must lie between 1 and {LARGEST_KERNEL} on each side."
            )
        if not 1 <= taps <= positions:
            raise ValueError(f"`taps` (={taps}) must be between 1 and the kernel's {positions} positions.")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"`groups` (={groups}) must divide `{name}` (={channels}).")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"`padding` (={padding!r}) must be a number, a pair, same or valid.")
        if padding == "same" and pair(stride) != (1, 1):
            raise ValueError(f"`padding` (={padding!r}) has no stride other than 1; `stride` is {stride}.")
        self.in_channels, self.out_channels, self.taps = in_channels, out_channels, taps
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.groups, self.padding_mode = groups, padding_mode
        self.learn, self.quantize, self.l1 = learn, quantize, l1
        self.normalize, self.lr_scale, self.lattice_decay = normalize, lr_scale, lattice_decay
        self.displacement = nn.Parameter(self._spread(positions), requires_grad=learn)
        self.pointwise = nn.Conv2d(in_channels * taps, out_channels, 1, groups=groups, bias=bias)
        self._made: tuple[Tensor, bool, Tensor] | None = None

    def _spread(self, positions: int) -> Tensor:
        """Every copy of a channel on a grid point of its own, the centre first, then row by row."""
        (low_y, _), (low_x, _) = map(window, self.kernel_size)
        centre = -low_y * self.kernel_size[1] - low_x
        others = (p for p in range(positions) if p != centre)
        places = torch.tensor([centre, *itertools.islice(others, self.taps - 1)])
        grid = torch.stack((places // self.kernel_size[1] + low_y, places % self.kernel_size[1] + low_x), -1)
        return grid.float().repeat(self.in_channels, 1, 1)

    def _grid(self) -> Tensor:
        axes = [torch.arange(low, high + 1.0) for low, high in map(window, self.kernel_size)]
        return torch.cartesian_prod(*axes)

    @property
    def integer(self) -> bool:
        """Whether forward moves by whole grid steps, so that each copy has one place in the kernel."""
        return self.quantize or bool((self.displacement == round_half_away(self.displacement)).all())

    def kernel(self) -> Tensor:
        """The dense kernel this layer equals: (out_channels, in_channels / groups, ky, kx)."""
        if self.training and self.learn:
            self._clamp()
        places = taps(self._inside(), self.kernel_size, self.quantize, self.normalize)
        g, positions = self.groups, math.prod(self.kernel_size)
        weight = self.pointwise.weight.view(g, self.out_channels // g, self.in_channels // g, self.taps)
        places = places.view(g, self.in_channels // g, self.taps, positions)
        kernel = torch.einsum("goit,gitp->goip", weight, places.to(weight.dtype))
        return kernel.reshape(self.out_channels, self.in_channels // g, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, around(self, self.padding, self.kernel_size), mode=self.padding_mode)
            padding = 0
        if self.taps == 1 and not self.learn and self.groups < self.in_channels:
            weight = self.pointwise.weight
            if x.is_cuda and self._whole_map():
                used = round_half_away(self._inside()) if self.quantize else self._inside()
                x = displace(x, used[:, 0] * self.dilation[0], self.stride[0], self.quantize)
            else:
                x = F.conv2d(x, self._moves(weight.dtype), None, self.stride, padding, self.dilation, self.in_channels)
            return F.conv2d(x, weight, self.pointwise.bias, groups=self.groups)
        return F.conv2d(x, self.kernel(), self.pointwise.bias, self.stride, padding, self.dilation, self.groups)

    def _whole_map(self) -> bool:
        """Whether the output's positions are every `stride`-th of the input's, and displacements are in pixels."""
        (ky, kx), (dilation, other) = self.kernel_size, self.dilation
        alike = self.stride[0] == self.stride[1] and dilation == other and (dilation == 1 or self.quantize)
        centred = ky % 2 == kx % 2 == 1 and self.padding in ("same", (dilation * (ky // 2), dilation * (kx // 2)))
        return alike and centred and self.padding_mode == "zeros"

    def _moves(self, dtype: torch.dtype) -> Tensor:
        """The depthwise kernel (in_channels, 1, ky, kx) of the one copy that each channel has.

        Made anew only when a displacement has changed: making it takes as long as a small pointwise convolution. Only
        the CPU can look without waiting for work that is under way.
        """
        now = self.displacement
        look = now.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and self._made is not None:
            before, rounded, kernel = self._made
            same = (kernel.dtype, before.dtype, rounded) == (dtype, now.dtype, self.quantize)
            if same and torch.equal(before, now):
                return kernel
        with torch.inference_mode(False), torch.no_grad():
            kernel = taps(self._inside(), self.kernel_size, self.quantize).to(dtype)
            self._made = (now.detach().clone(), self.quantize, kernel) if look else None
        return kernel

    def _inside(self) -> Tensor:
        """The displacements as they are used: what an optimizer step pushed out of the window counts as its edge."""
        axes = zip(self.displacement.unbind(-1), map(window, self.kernel_size), strict=True)
        return torch.stack([axis.clamp(low, high) for axis, (low, high) in axes], -1)

    @torch.no_grad()
    def _clamp(self) -> None:
        """Keep displacements inside the window, so that one which was pushed out finds its way back.

        Through `data`: autograd may hold the displacements since a call before, which changed what there was to change.
        """
        for axis, (low, high) in enumerate(map(window, self.kernel_size)):
            self.displacement.data[..., axis].clamp_(low, high)

    def settle(self) -> None:
        """Fix rounded displacements at their grid points and stop learning them; the output does not change.

        Copies that met on one grid point are summed into the first; the others go, with weight zero, to free points,
        so that every copy has a place of its own in the kernel. A layer that does not round is left alone.
        """
        if not self.quantize:
            return
        self._clamp()
        low = torch.tensor([window(size)[0] for size in self.kernel_size])
        grid = (round_half_away(self.displacement.detach()).cpu() - low).long()
        place = grid[..., 0] * self.kernel_size[1] + grid[..., 1]
        weight = self.pointwise.weight.detach().clone()
        # Seen as (output channels of a group, input channel and copy of that group), group by group.
        by_group = weight.view(self.groups, self.out_channels // self.groups, self.in_channels // self.groups, -1)
        met = False
        for channel, places in enumerate(place.tolist()):
            free = [p for p in range(math.prod(self.kernel_size)) if p not in places]
            group, column = divmod(channel, self.in_channels // self.groups)
            for copy in range(1, self.taps):
                if places[copy] in places[:copy]:
                    first = places.index(places[copy])
                    by_group[group, :, column, first] += by_group[group, :, column, copy]
                    by_group[group, :, column, copy] = 0
                    places[copy] = free.pop(0)
                    met = True
            place[channel] = torch.tensor(places)
        with torch.no_grad():
            self.displacement.copy_(self._grid()[place])
            if met and parametrize.is_parametrized(self.pointwise, "weight"):
                self.pointwise.weight = weight
            elif met:
                self.pointwise.weight.copy_(weight)
        self.freeze()

    def freeze(self) -> None:
        """Stop learning the displacements, which stay where they are."""
        self.displacement.requires_grad_(False)
        self.learn = False

    def carrying(self) -> Tensor:
        """Which copies (in_channels, taps) have a weight that is not zero."""
        weight = self.pointwise.weight.detach()
        return weight.view(self.groups, self.out_channels // self.groups, -1).any(1).view(-1, self.taps)

    def penalty(self) -> Tensor:
        """What the layer adds to the training loss while its displacements learn, see `pull`.

        With `normalize` the gradient from the images has length 1 for each displacement, and `l1` is the pull's
        strength beside it.
        """
        return pull(self.displacement, self.l1, self.lattice_decay) if self.learn else self.displacement.new_zeros(())

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """How an optimizer has to treat parameters of this layer: displacements at their own pace, without decay."""
        return {"displacement": {"lr_scale": self.lr_scale, "weight_decay": 0.0}}

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "taps": self.taps,
            "groups": self.groups,
            "bias": self.pointwise.bias is not None,
            **spatial_config(self),
            "learn": self.learn,
            "quantize": self.quantize,
            "l1": self.l1,
            "normalize": self.normalize,
            "lr_scale": self.lr_scale,
            "lattice_decay": self.lattice_decay,
        }

    def macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-adds for one image of `input_shape` (N, C, H, W): the pointwise ones; moving costs none."""
        padding = [0, 0]
        if not isinstance(self.padding, str):
            padding = [2 * p for p in self.padding]
        elif self.padding == "same":
            padding = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        places = 1
        for size, pad, k, d, s in zip(
            input_shape[-2:], padding, self.kernel_size, self.dilation, self.stride, strict=True
        ):
            places *= (size + pad - d * (k - 1) - 1) // s + 1
        return places * self.out_channels * (self.in_channels // self.groups) * self.taps

    def output_convolutions(self) -> tuple[nn.Conv2d, ...]:
        """The convolutions whose outputs are this layer's output."""
        return (self.pointwise,)

    @torch.no_grad()
    def forms(self, target: str) -> dict[str, nn.Module]:
        """The same function in plain torch modules, in every form that there is for `target`, the default first.

        With one whole-pixel copy that is a one-hot depthwise convolution and the pointwise one, with several the dense
        kernel; where nothing moves the pointwise one is all there is. "slices" takes parts of the padded map. A copy
        without weight counts as one in the centre, so that it widens no window.
        """
        inside = self._inside() * self.carrying().unsqueeze(-1)
        places = taps(inside, self.kernel_size, self.quantize)
        forms = convolution_forms(places.to(self.pointwise.weight.dtype), self.kernel(), self.pointwise, self)
        return {name: form.train(self.training) for name, form in forms.items()}

    def lower(self, target: str) -> nn.Module:
        """The default of `forms`."""
        return next(iter(self.forms(target).values()))

    def extra_repr(self) -> str:
        kernel = "x".join(str(k) for k in self.kernel_size)
        text = f"{self.in_channels}, {self.out_channels}, {self.taps} of {kernel}"
        return text + unusual(self)
