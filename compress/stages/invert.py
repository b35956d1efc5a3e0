"""Invert: convolutions become inverted bottlenecks: expand by a 1x1 convolution, filter depthwise, project.

What it does. Each convolution with a kernel wider than 1x1 becomes an `InvertedConv2d`: a 1x1 convolution to
`expansion` times the input channels, a depthwise k x k convolution and a 1x1 projection, with a ReLU behind each of the
first two. It starts from the trained weights: input channels are copied as often as it takes, and the copies filtered,
by the kernels that carry most of the output's energy on real activations, with biases so large that the ReLUs clip
nothing; then the projection is solved by least squares against the original layer's output, layer by layer. With as
many copies as the kernel has positions (twice as many, where inputs are negative) the layer is exactly the convolution.

When to use it, and when not. It buys bytes and multiply-adds as long as `expansion` is small: of a 3x3 convolution with
as many outputs as inputs about two ninths are left for each copy, so 5 copies cost more than the convolution did; the
paper's 6 belong to networks that are narrow between their blocks. At the start most weights of the expansion are zero:
there is room to learn, so fine-tune afterwards.

Knobs. `expansion`: copies of each input channel, on average. `clip6`: ReLU6 in place of ReLU, for integer arithmetic
of few bits. `images`: how many calibration images the start is solved on. `ridge`: pulls the projection towards zero,
as a share of the activations' mean power. `gate`: none, macs, bytes or latency: layers that do not get cheaper by it
are kept.

Measured. ResNet-20 on CIFAR-10 (91.73 %), recipe `inverted`, expansion 3: 89.57 % before training, 91.59 after ten
epochs, in 0.80 of the MACs and 1.19 of the time in onnxruntime (one image, 2 cores). Expansion 1, beside other
operators: `benchmarks/operators.py`.

Reference. Sandler et al., CVPR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.nn.geometry import spatial_config
from compress.nn.inverted import InvertedConv2d
from compress.reconstruct import Normal, fit_convolution, normal_equations, seen_by, solve
from compress.stage import Edit, Keep
from compress.substitute import Old, Substitution, check_settings, substitute
from compress.surgery import layers, left_out
from compress.task import Task, Work


@dataclass(frozen=True)
class Invert(Substitution):
    """Settings of the stage; see the module's card."""

    expansion: int = 3
    clip6: bool = False

    def __post_init__(self) -> None:
        check_settings(self, expansion=1)

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing."""
        left_out(model, layers(model, self.kinds), self.include, self.exclude)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        edit = substitute(model, task, work, self, self._start, {"expansion": self.expansion})
        made = {site.name: edit.model.get_submodule(site.name) for site in edit.sites if site.after is not None}
        used = {name: layer.expansion for name, layer in made.items() if isinstance(layer, InvertedConv2d)}
        fewer = {name: copies for name, copies in used.items() if copies < self.expansion}
        return replace(edit, notes={**edit.notes, "fewer": fewer})

    def _start(self, old: Old) -> tuple[nn.Module, float]:
        positions = math.prod(old.layer.kernel_size)
        if positions == 1:
            raise Keep("a 1x1 kernel has nothing for a depthwise convolution to do")
        if old.layer.groups > 1:
            raise Keep(f"its groups (={old.layer.groups}) read channels of their own, which an expansion would mix")
        low, high = _range(_inputs(old))
        exact = positions if bool((low >= 0).all()) else 2 * positions
        if self.expansion >= exact and not self.clip6:
            new = empty_inverted(old.layer, exact, clip6=False)
            copy_kernel(old.layer, new)
            return new, 0.0
        new = empty_inverted(old.layer, min(self.expansion, positions), self.clip6)
        normal = normal_equations(old.layer, old.seen(), old.images, bias=True, name=old.name)
        source, kernels = leading_kernels(normal, new, self.ridge)
        copy_inputs(new, source, low.clamp(max=0), high)
        set_depthwise(new, old, kernels)
        pairs = ((new.activation(new.depthwise(new.activation(new.expand(x)))).detach(), y) for x, y in old.seen())
        return new, fit_convolution(new.project, pairs, old.images, self.ridge)


def empty_inverted(layer: nn.Conv2d, expansion: int, clip6: bool) -> InvertedConv2d:
    """An inverted bottleneck of the convolution's geometry, on its device, not yet fitted."""
    new = InvertedConv2d(
        layer.in_channels,
        layer.out_channels,
        expansion=expansion,
        clip6=clip6,
        **spatial_config(layer),
    )
    return new.to(device=layer.weight.device, dtype=layer.weight.dtype)


@torch.no_grad()
def copy_kernel(layer: nn.Conv2d, new: InvertedConv2d) -> None:
    """A copy of every input channel for every kernel position, then one of its negative if there is room.

    The depthwise kernels pick the positions, the projection has the weights: exactly the convolution.
    """
    positions = math.prod(new.kernel_size)
    signs = torch.tensor([1.0, -1.0])[: new.expansion // positions].repeat_interleave(positions)
    _set(new.expand, torch.kron(torch.eye(new.in_channels), signs[:, None]))
    _set(new.depthwise, torch.eye(positions).repeat(new.in_channels * len(signs) // positions, 1))
    kernel = layer.weight.flatten(2).cpu()  # outputs, inputs, positions
    _set(new.project, (kernel.repeat(1, 1, len(signs) // positions) * signs).flatten(1), layer.bias)


def leading_kernels(normal: Normal, new: InvertedConv2d, ridge: float) -> tuple[Tensor, Tensor]:
    """For every hidden channel the input channel it is a copy of, and its kernel (positions,) of length 1.

    Each input channel has as many kernels as positions that are orthogonal in what they give to the output, measured on
    the channel's own activations; of all of them together those are taken that give most energy.
    """
    channels, positions = new.in_channels, math.prod(new.kernel_size)
    gram, sums = normal.gram[0][:-1, :-1], normal.gram[0][-1, :-1]
    centred = gram - torch.outer(sums, sums) / normal.gram[0][-1, -1]
    blocks = centred.view(channels, positions, channels, positions).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    dense = solve(normal, ridge)[0][:-1].reshape(channels, positions, -1)
    maps = dense @ dense.mT
    values, vectors = torch.linalg.eigh(blocks)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    energy, left = torch.linalg.eigh(root.mT @ maps @ root)
    kernels = (maps @ root @ left).mT
    kernels = kernels / kernels.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    chosen, _ = energy.flatten().argsort(descending=True, stable=True)[: channels * new.expansion].sort()
    return chosen // positions, kernels.flatten(0, 1)[chosen]


@torch.no_grad()
def copy_inputs(new: InvertedConv2d, source: Tensor, low: Tensor, high: Tensor) -> None:
    """Every hidden channel is a copy of its `source`, lifted to where no ReLU clips it."""
    scale, lift = _above_zero(low, high, new.clip6)
    _set(new.expand, torch.diag(scale)[source], lift[source])


@torch.no_grad()
def set_depthwise(new: InvertedConv2d, old: Old, kernels: Tensor) -> None:
    """Set the depthwise kernels, and lift what they give to where no ReLU clips it.

    The lift is behind the padding, so that the projection's bias can take it back. Of a kernel and its negative the one
    is taken that needs the smaller lift.
    """
    _set(new.depthwise, kernels)
    low, high = _range(new.depthwise(new.activation(new.expand(x))) for x in _inputs(old))
    turned = -low > high
    low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
    scale, lift = _above_zero(low, high, new.clip6)
    _set(new.depthwise, kernels * (scale * torch.where(turned, -1.0, 1.0))[:, None], lift)


def _inputs(old: Old) -> Iterator[Tensor]:
    """What the layer sees in the network as substituted so far, batch by batch."""
    for images in old.pairs.images:
        for x, _ in seen_by(old.pairs.model, old.layer, old.calls, images):
            yield x


def _range(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every channel."""
    ends = [torch.stack((x.amin((0, 2, 3)), x.amax((0, 2, 3)))).detach().cpu() for x in tensors]
    return torch.stack(ends)[:, 0].amin(0), torch.stack(ends)[:, 1].amax(0)


def _above_zero(low: Tensor, high: Tensor, clip6: bool) -> tuple[Tensor, Tensor]:
    """The factor and the summand that bring values between `low` and `high` above 0, and with `clip6` below 6."""
    scale = 6 / (high - low).clamp(min=1e-6) if clip6 else torch.ones_like(low)
    return scale, -low * scale


def _set(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    layer.weight.copy_(weight.reshape_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)
