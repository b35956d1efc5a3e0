"""Fire: convolutions become a 1x1 squeeze and, side by side, 1x1 and k x k expand convolutions.

What it does. Each convolution with a kernel wider than 1x1 becomes a `Fire` module: a 1x1 convolution to few channels,
a ReLU, a 1x1 and a k x k convolution of the result, their outputs concatenated. It starts from the trained weights: the
squeeze takes the combinations of input channels that carry most of the output's energy on real activations, with a bias
so large that the ReLU clips none of them, and the expand convolutions are solved by least squares against the original
layer's output, layer by layer. With twice as many squeeze channels as inputs (as many, where no input is negative) and
`pct3: 1` the layer is exactly the convolution.

When to use it, and when not. It buys bytes and multiply-adds: with the defaults about a third of a 3x3 convolution with
as many outputs as inputs is left. The first convolution, with its few inputs, gains nothing. Outputs of the 1x1 branch
lose their spatial extent, which costs more than the squeeze does: raise `pct3` first where accuracy matters. Expect to
fine-tune afterwards.

Knobs. `squeeze`: squeeze channels as a share of the outputs, at most twice the inputs (the paper's modules have 0.125).
`pct3`: share of the outputs that the k x k convolution makes. `images`: how many calibration images the start is solved
on. `ridge`: pulls the expand weights towards zero, as a share of the activations' mean power. `gate`: none, macs, bytes
or latency: layers that do not get cheaper by it are kept.

Measured. ResNet-20 on CIFAR-10 (91.73 %, 1.09 MB), recipe `squeezenet`: 78.48 % before training, 89.35 after ten
epochs, in 353 kB; no faster in onnxruntime (1.06 of the time for one image on 2 cores). AlexNet for CIFAR (90.81 %),
recipe `alexnet_fire` (`squeeze: 0.375`) with ResNet-56 as teacher, one seed: 91.26 % with 52 times fewer parameters
(`benchmarks/alexnet_fire.py`). Beside other operators: `benchmarks/operators.py`.

Reference. Iandola et al., arXiv:1602.07360.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.fire import Fire as FireModule
from compress.nn.fire import middle
from compress.nn.geometry import spatial_config
from compress.reconstruct import Normal, normal_equations, seen_by, solve
from compress.stage import Edit, Keep
from compress.substitute import Old, Substitution, check_settings, substitute
from compress.surgery import layers, left_out
from compress.task import Task, Work


@dataclass(frozen=True)
class Fire(Substitution):
    """Settings of the stage; see the module's card."""

    squeeze: float = 0.5
    pct3: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self)
        if not (math.isfinite(self.squeeze) and self.squeeze > 0):
            raise ConfigError(f"`squeeze` (={self.squeeze}) must be a finite number above 0.")
        if not 0 < self.pct3 <= 1:
            raise ConfigError(f"`pct3` (={self.pct3}) must be above 0 and at most 1.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing, and for layers of which a part would have no channel."""
        found = layers(model, self.kinds)
        reasons = left_out(model, found, self.include, self.exclude)
        thin = []
        for name, layer in found.items():
            assert isinstance(layer, nn.Conv2d)
            if reasons[name] or self._why_kept(layer):
                continue
            squeeze, expand1, expand3 = self._widths(layer)
            if min(squeeze, expand3) < 1 or (self.pct3 < 1 and expand1 < 1):
                thin.append(
                    f"{name or 'the model itself'} ({squeeze} squeeze, {expand1} 1x1, {expand3} k x k channels)"
                )
        if thin:
            raise ConfigError(
                f"`squeeze` (={self.squeeze}) and `pct3` (={self.pct3}) leave nothing of a part of {', '.join(thin)}; "
                "change them, or put these layers into `exclude`."
            )

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        edit = substitute(model, task, work, self, self._start, {"squeeze": self.squeeze, "pct3": self.pct3})
        made = {site.name: edit.model.get_submodule(site.name) for site in edit.sites if site.after is not None}
        units = {name: layer for name, layer in made.items() if isinstance(layer, FireModule)}
        fewer = {
            name: unit.widths[0]
            for name, unit in units.items()
            if unit.widths[0] < round(self.squeeze * unit.out_channels)
        }
        return replace(edit, notes={**edit.notes, "fewer": fewer})

    def _why_kept(self, layer: nn.Conv2d) -> str:
        if math.prod(layer.kernel_size) == 1:
            return "a 1x1 kernel has no spatial extent to squeeze"
        if layer.groups > 1:
            return f"its groups (={layer.groups}) read channels of their own, which a squeeze would mix"
        if self.pct3 < 1 and middle(layer) is None:
            return "its padding does not keep the size, so a 1x1 branch would give another one; `pct3: 1` has no such"
        return ""

    def _widths(self, layer: nn.Conv2d) -> tuple[int, int, int]:
        expand3 = round(self.pct3 * layer.out_channels)
        squeeze = min(round(self.squeeze * layer.out_channels), 2 * layer.in_channels)
        return squeeze, layer.out_channels - expand3, expand3

    def _start(self, old: Old) -> tuple[nn.Module, float]:
        why = self._why_kept(old.layer)
        if why:
            raise Keep(why)
        new = empty_fire(old.layer, *self._widths(old.layer))
        lossless = _is_lossless(new, old)
        if lossless and not new.widths[1]:
            copy_inputs(new)
            copy_kernel(old.layer, new)
            return new, 0.0
        normal = normal_equations(old.layer, old.seen(), old.images, bias=True, name=old.name)
        near = choose_near(normal, new, self.ridge)
        if lossless:
            copy_inputs(new)
        else:
            fit_squeeze(new, old, leading_directions(normal, new, near, self.ridge))
        return new, fit_expand(new, old, near, self.ridge)


def empty_fire(layer: nn.Conv2d, squeeze: int, expand1: int, expand3: int) -> FireModule:
    """A Fire module of the convolution's geometry, on its device, not yet fitted."""
    new = FireModule(
        layer.in_channels,
        layer.out_channels,
        squeeze,
        expand1,
        expand3,
        **spatial_config(layer),
        reorder=expand1 > 0,
    )
    return new.to(device=layer.weight.device, dtype=layer.weight.dtype)


def _is_lossless(new: FireModule, old: Old) -> bool:
    """Whether there are squeeze channels enough for every input channel, and for its negative where it has one."""
    if new.widths[0] < new.in_channels:
        return False
    return new.widths[0] == 2 * new.in_channels or all(bool((x >= 0).all()) for x in _inputs(old))


@torch.no_grad()
def copy_inputs(new: FireModule) -> None:
    """The squeeze hands on every input channel, then negatives of them: what the ReLU clips of one, the other has."""
    eye = torch.eye(new.in_channels)
    new.squeeze.weight.copy_(torch.cat((eye, -eye))[: new.widths[0], :, None, None])
    assert new.squeeze.bias is not None
    new.squeeze.bias.zero_()


@torch.no_grad()
def copy_kernel(layer: nn.Conv2d, new: FireModule) -> None:
    """Behind copied inputs, and with all outputs in the k x k branch: exactly the convolution."""
    new.expand3.weight.copy_(torch.cat((layer.weight, -layer.weight), 1)[:, : new.widths[0]])
    assert new.expand3.bias is not None
    new.expand3.bias.copy_(torch.zeros_like(new.expand3.bias) if layer.bias is None else layer.bias)


def _inputs(old: Old) -> Iterator[Tensor]:
    """What the layer sees in the network as substituted so far, batch by batch."""
    for images in old.pairs.images:
        for x, _ in seen_by(old.pairs.model, old.layer, old.calls, images):
            yield x


def choose_near(normal: Normal, new: FireModule, ridge: float) -> Tensor:
    """Outputs for the 1x1 branch: those that lose least of their energy with their spatial extent."""
    fall = _energy(normal, *_solved(normal, _all_rows(normal), ridge))
    if new.widths[1]:
        fall = fall - _energy(normal, *_solved(normal, _middle_rows(new, new.in_channels), ridge))
    near, _ = fall.argsort(stable=True)[: new.widths[1]].sort()
    return near


def leading_directions(normal: Normal, new: FireModule, near: Tensor, ridge: float) -> Tensor:
    """Combinations of input channels (rows), each of variance 1, by how much of the output's energy goes through them.

    Input channels are taken for as correlated with each other as they are, window positions for independent.
    """
    channels, positions = new.in_channels, math.prod(new.kernel_size)
    gram, count = normal.gram[0], normal.gram[0, -1, -1]
    mean = gram[-1, :-1].view(channels, positions).mean(1) / count
    second = gram[:-1, :-1].view(channels, positions, channels, positions).diagonal(dim1=1, dim2=3).mean(-1) / count
    _, dense = _solved(normal, _all_rows(normal), ridge)
    maps = dense[:-1].reshape(channels, positions, -1)[..., _others(near, new)].flatten(1)
    if len(near):
        _, pointwise = _solved(normal, _middle_rows(new, channels), ridge)
        maps = torch.cat((maps, pointwise[:-1, near]), 1)
    values, vectors = torch.linalg.eigh(second - torch.outer(mean, mean))
    values = values.clamp(min=0)
    alive = values > 1e-8 * values.max()
    carried = (vectors * values.sqrt()).mT @ maps
    _, left = torch.linalg.eigh(carried @ carried.mT)  # in rising order
    directions: Tensor = left.flip(1).mT @ (vectors * torch.where(alive, values, 1).rsqrt() * alive).mT
    return directions


@torch.no_grad()
def fit_squeeze(new: FireModule, old: Old, directions: Tensor) -> None:
    """Set the squeeze to the first of these directions, each lifted so far that the ReLU clips nothing.

    Where the ReLU clips nothing the module is linear, and starts as the best of its rank but for the image's border,
    where the expand convolutions see zeros in place of the lift. Of a direction and its negative the one is taken that
    needs the smaller lift.
    """
    rows = torch.cat((directions, -directions))[: new.widths[0]].to(new.squeeze.weight)
    assert new.squeeze.bias is not None
    new.squeeze.weight.copy_(rows[..., None, None])
    new.squeeze.bias.zero_()
    ends = [torch.stack((z.amin((0, 2, 3)), z.amax((0, 2, 3)))) for z in map(new.squeeze, _inputs(old))]
    low, high = torch.stack(ends)[:, 0].amin(0), torch.stack(ends)[:, 1].amax(0)
    turned = -low > high
    new.squeeze.weight.copy_(torch.where(turned[:, None], -rows, rows)[..., None, None])
    new.squeeze.bias.copy_(torch.where(turned, high, -low))


@torch.no_grad()
def fit_expand(new: FireModule, old: Old, near: Tensor, ridge: float) -> float:
    """Solve the expand convolutions behind the squeeze as it is; gives back the relative squared error."""
    squeezed = ((new.relu(new.squeeze(x)), y) for x, y in old.seen())
    normal = normal_equations(new.expand3, squeezed, old.images, bias=True, name=old.name)
    wide = _others(near, new)
    branches = [(new.expand3, _all_rows(normal), wide)]
    if new.expand1 is not None:
        branches.append((new.expand1, _middle_rows(new, new.widths[0]), near))
        new.order.copy_(torch.cat((near, wide)).argsort())
    explained = 0.0
    for convolution, rows, outputs in branches:
        rows, weights = _solved(normal, rows, ridge)
        explained += float(_energy(normal, rows, weights)[outputs].sum())
        assert convolution.bias is not None
        convolution.weight.copy_(weights[:-1, outputs].mT.reshape(convolution.weight.shape))
        convolution.bias.copy_(weights[-1, outputs])
    return max(1 - explained / max(float(normal.power.sum()), 1e-30), 0.0)


def _others(near: Tensor, new: FireModule) -> Tensor:
    """The outputs of the k x k branch, in rising order."""
    free = torch.ones(new.out_channels, dtype=torch.bool)
    free[near] = False
    return free.nonzero().flatten()


def _all_rows(normal: Normal) -> Tensor:
    return torch.arange(normal.gram.shape[-1])


def _middle_rows(new: FireModule, channels: int) -> Tensor:
    """Of the features of a k x k convolution over so many channels those that a 1x1 convolution sees, and the 1."""
    place = middle(new.expand3)
    assert place is not None
    positions = math.prod(new.kernel_size)
    rows = torch.arange(channels) * positions + place[0] * new.kernel_size[1] + place[1]
    return torch.cat((rows, torch.tensor([channels * positions])))


def _solved(normal: Normal, rows: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """These features, and the least-squares weights from them to all outputs."""
    part = Normal(normal.gram[:, rows][:, :, rows], normal.cross[:, rows], normal.power, bias=True)
    return rows, solve(part, ridge)[0]


def _energy(normal: Normal, rows: Tensor, weights: Tensor) -> Tensor:
    """How much of the sum of squares of every output these weights of these features explain."""
    gram, cross = normal.gram[0][rows][:, rows], normal.cross[0][rows]
    return (weights * (2 * cross - gram @ weights)).sum(0)
