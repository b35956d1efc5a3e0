"""Shift: convolutions become displaced copies of their input channels and one pointwise convolution.

What it does. Each convolution with a kernel wider than 1x1 becomes a `ShiftConv2d` with `taps` displaced copies of each
input channel. It starts from the trained weights: the kernel positions that matter most are found by backward
elimination on real activations, and the pointwise weights are solved by least squares against the original layer's
output, layer by layer. With all positions kept the layer is exactly the convolution.

When to use it, and when not. It buys bytes and multiply-adds: `taps` of k*k of both. With one tap it buys time too;
with several the file takes the faster of a dense kernel and depthwise copies, as measured (three copies of 64 channels
and more in onnxruntime: 0.5 to 0.9 of the convolution's time; below, and in integers, time stays what it was). Small
networks need 3 or 4 taps of 9, and fine-tuning afterwards.

Knobs. `taps`: copies kept of each input channel. `budget`: the share of the model's parameters to come down to,
displacements counted; `taps` is then the most that a layer gets, and how many each one gets is chosen by what fewer are
measured to do to the network's answers, one layer at a time (0: all get `taps`). `places`: where they start: `data` as
above; `grouped`, the fixed directions of Wu et al.; `random`, the baseline that learned displacements have to beat.
`learn`: train the displacements by bilinear interpolation. `quantize`: round them in every forward pass
(straight-through gradient), so that the layer stays whole-pixel. `l1`: pull them towards zero. `lattice_decay`: pull
them towards whole pixels, so that `ConvertShift` or `FreezeShifts` changes less later. `normalize`, `lr_scale`:
displacements' gradients of length 1 at a hundredth of the learning rate, as Jeon & Kim train them; Chen et al. use
false and 1. `images`: how many calibration images the start is solved on. `gate`: none, macs, bytes or latency: layers
that do not get cheaper by it (in time: at least 10 % in the target runtime) are kept.

Measured. See the tables in README.md and benchmarks/README.md. With `normalize`, displacements hardly leave their grid
point in a short fine-tuning; without it `l1` zeroes many, and costs accuracy (`benchmarks/sparse_shift.py`). On a GPU
one copy makes a layer's forward pass 2 to 4 times as long as the pointwise convolution's alone, longer than cuDNN's
depthwise one does (`benchmarks/shift_cuda.py`): there it buys bytes.

Reference. Wu et al., CVPR 2018; Jeon & Kim, NeurIPS 2018; Chen et al., CVPR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.allocate import Choice, harm, share_out
from compress.errors import ConfigError
from compress.nn.geometry import spatial_config
from compress.nn.shift import LEARNING_RATE_SCALE, ShiftConv2d
from compress.nn.taps import window
from compress.off_map import off_the_map
from compress.reconstruct import (
    Normal,
    eliminate,
    execution_order,
    own_equations,
    plain_images,
    relative_error,
    solve_kept,
)
from compress.stage import Edit, Keep
from compress.substitute import Old, Substitution, check_settings, substitute
from compress.surgery import layers, left_out
from compress.task import Task, Work

PLACES = ("data", "grouped", "random")
JUDGES = 256  # images on which fewer taps are judged when a budget is shared out


@dataclass(frozen=True)
class Shift(Substitution):
    """Settings of the stage; see the module's card."""

    taps: int = 4
    budget: float = 0.0
    places: str = "data"
    learn: bool = False
    quantize: bool = True
    l1: float = 0.0
    normalize: bool = True
    lr_scale: float = LEARNING_RATE_SCALE
    lattice_decay: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, taps=1)
        if self.places not in PLACES:
            raise ConfigError(f"`places` (={self.places!r}) must be one of {', '.join(PLACES)}.")
        if not 0 <= self.budget < 1:
            raise ConfigError(f"`budget` (={self.budget}) must be a share of the parameters, below 1; 0 is no budget.")
        for name in ("l1", "lr_scale", "lattice_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"`{name}` (={value}) must be a finite number, 0 or more.")
        for name in ("l1", "lattice_decay"):
            if getattr(self, name) and not self.learn:
                value = getattr(self, name)
                raise ConfigError(
                    f"`{name}` (={value}) pulls at learned displacements; set `learn: true` or `{name}: 0`."
                )

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing, and for kernels with fewer positions than `taps`."""
        found = layers(model, self.kinds)
        reasons = left_out(model, found, self.include, self.exclude)
        if self.budget:
            self._require_budget(model, self._chosen(model))
        small = [
            f"{name or 'the model itself'} has {positions}"
            for name, layer in found.items()
            if isinstance(layer, nn.Conv2d) and 1 < (positions := math.prod(layer.kernel_size)) < self.taps
            if not reasons[name]
        ]
        if small:
            raise ConfigError(
                f"`taps` (={self.taps}) must not exceed the kernel's positions: {', '.join(small)}; "
                "lower `taps`, or put these layers into `exclude`."
            )

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        before = _parameters(model)
        shared = self._shared_out(model, task, work) if self.budget else {}

        def start(old: Old) -> tuple[nn.Module, float]:
            taps = shared.get(old.name, self.taps)
            if not taps:
                raise Keep("within the budget as it is")
            return self._start(old, taps, work.seed(task.seed, "places", old.name))

        edit = substitute(model, task, work, self, start, {"taps": self.taps})
        if self.places != "data" and (off := off_the_map(edit.model, task.example.to(task.device))):
            raise ConfigError("\n".join(f"{one} Or put the layer into `exclude`." for one in off))
        if not self.budget:
            return edit
        changed = {site.name: shared[site.name] for site in edit.sites if site.after is not None}
        left = round(_parameters(edit.model) / before, 4)  # more than the budget where a gate kept layers
        return replace(edit, notes={**edit.notes, "taps": changed, "budget": self.budget, "parameters_left": left})

    def _start(self, old: Old, taps: int, seed: int) -> tuple[nn.Module, float]:
        if math.prod(old.layer.kernel_size) == 1:
            raise Keep("a 1x1 kernel has one position only, so there is nothing to shift")
        if taps == math.prod(old.layer.kernel_size):
            new = self._empty(old.layer, taps)
            copy_kernel(old.layer, new)
            return new, 0.0
        return self._fitted(old.layer, taps, old.normal(), seed)

    def _fitted(self, layer: nn.Conv2d, taps: int, normal: Normal, seed: int) -> tuple[ShiftConv2d, float]:
        new = self._empty(layer, taps)
        places = None
        if self.places == "grouped":
            places = grouped_places(new.in_channels, new.kernel_size, taps)
        elif self.places == "random":
            places = random_places(new.in_channels, new.kernel_size, taps, seed)
        return new, fit_shift(new, normal, self.ridge, places)

    def _shared_out(self, model: nn.Module, task: Task, work: Work) -> dict[str, int]:
        """Taps for each layer, so that the model comes down to `budget` of its parameters with the least harm.

        0 taps is the convolution as it is, where that is within the budget.
        """
        reached = execution_order(model, layers(model, self.kinds), task.example.to(task.device))
        chosen = {name: layer for name, layer in self._chosen(model).items() if name in reached}
        self._require_budget(model, chosen)
        was_training = model.training
        model.eval()
        judges = plain_images(task.calibration, JUDGES, task.device)
        with torch.no_grad():
            wanted = [model(x) for x in judges]
        normals = own_equations(model, chosen, reached, plain_images(task.calibration, self.images, task.device))
        choices: dict[str, list[Choice]] = {}
        work.progress.start("how many taps each layer needs", len(chosen))
        for name, layer in chosen.items():
            work.progress.step(name)
            seed = work.seed(task.seed, "places", name)
            choices[name] = [Choice(sum(p.numel() for p in layer.parameters()), 0.0)]
            for taps in range(1, self.taps + 1):
                new = self._fitted(layer, taps, normals[name], seed)[0].eval()
                choices[name].append(Choice(_size(layer, taps), harm(model, layer, new, judges, wanted)))
        work.progress.end()
        model.train(was_training)
        return share_out(choices, int(self.budget * _parameters(model)) - _others(model, chosen))

    def _chosen(self, model: nn.Module) -> dict[str, nn.Conv2d]:
        """The convolutions that this stage is about to replace."""
        found = layers(model, self.kinds)
        reasons = left_out(model, found, self.include, self.exclude)
        return {
            name: layer
            for name, layer in found.items()
            if isinstance(layer, nn.Conv2d) and not reasons[name] and math.prod(layer.kernel_size) > 1
        }

    def _require_budget(self, model: nn.Module, chosen: Mapping[str, nn.Conv2d]) -> None:
        before = _parameters(model)
        cheapest = sum(min(_size(c, 1), sum(p.numel() for p in c.parameters())) for c in chosen.values())
        least = _others(model, chosen) + cheapest
        if chosen and int(self.budget * before) < least:
            share = math.ceil(1000 * least / before) / 1000
            raise ConfigError(
                f"`budget` (={self.budget}) must be at least {share}: one tap everywhere leaves so much of {before:,}."
            )

    def _empty(self, layer: nn.Conv2d, taps: int) -> ShiftConv2d:
        """A shift layer of the convolution's geometry, on its device, not yet fitted."""
        new = ShiftConv2d(
            layer.in_channels,
            layer.out_channels,
            taps=taps,
            groups=layer.groups,
            bias=layer.bias is not None,
            **spatial_config(layer),
            learn=self.learn,
            quantize=self.quantize,
            l1=self.l1,
            normalize=self.normalize,
            lr_scale=self.lr_scale,
            lattice_decay=self.lattice_decay,
        )
        return new.to(device=layer.weight.device, dtype=layer.weight.dtype)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _others(model: nn.Module, chosen: Mapping[str, nn.Conv2d]) -> int:
    """Parameters that belong to none of the chosen layers."""
    own = {id(parameter) for layer in chosen.values() for parameter in layer.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)


def _size(layer: nn.Conv2d, taps: int) -> int:
    """Parameters of the shift layer that stands for a convolution: two numbers for each displacement."""
    bias = 0 if layer.bias is None else layer.out_channels
    return taps * layer.in_channels * (layer.out_channels // layer.groups + 2) + bias


def copy_kernel(layer: nn.Conv2d, new: ShiftConv2d) -> None:
    """All positions kept: the weights are the kernel's own, and the layer is exactly the convolution."""
    kept = torch.arange(math.prod(layer.kernel_size)).repeat(layer.in_channels // layer.groups, 1)
    with torch.no_grad():
        for group in range(layer.groups):
            _place(new, group, kept)
        new.pointwise.weight.copy_(layer.weight.reshape_as(new.pointwise.weight))
        if layer.bias is not None and new.pointwise.bias is not None:
            new.pointwise.bias.copy_(layer.bias)


def grouped_places(channels: int, kernel_size: tuple[int, int], taps: int) -> Tensor:
    """Fixed directions (channels, taps), as numbers of window positions: all of them in turn, channel by channel.

    Wu et al.'s own rule: the channels left over by whole turns stay at the centre. Further taps take the directions
    that follow in the window.
    """
    (low_y, _), (low_x, _) = map(window, kernel_size)
    positions = math.prod(kernel_size)
    turn = torch.arange(channels) % positions
    turn[channels // positions * positions :] = -low_y * kernel_size[1] - low_x
    return ((turn.unsqueeze(1) + torch.arange(taps)) % positions).sort(1).values


def random_places(channels: int, kernel_size: tuple[int, int], taps: int, seed: int) -> Tensor:
    """Different random window positions (channels, taps) for every channel."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(channels, math.prod(kernel_size), generator=generator).argsort(1)
    return order[:, :taps].sort(1).values


def fit_shift(new: ShiftConv2d, normal: Normal, ridge: float, places: Tensor | None = None) -> float:
    """Solve the pointwise weights, at `places` (in_channels, taps) or where elimination finds that they matter most.

    Gives back the relative squared error over all groups.
    """
    positions = math.prod(new.kernel_size)
    per_group = new.out_channels // new.groups
    left = 0.0
    for group in range(new.groups):
        if places is None:
            kept, weights = eliminate(normal, group, positions, new.taps, ridge)
        else:
            kept = places.view(new.groups, -1, new.taps)[group]
        rows = (torch.arange(len(kept)).unsqueeze(1) * positions + kept).flatten()
        if normal.bias:
            rows = torch.cat((rows, torch.tensor([len(kept) * positions])))
        if places is not None:
            weights = solve_kept(normal, group, rows, ridge)
        left += relative_error(normal, group, rows, weights) * float(normal.power[group])
        with torch.no_grad():
            _place(new, group, kept)
            outputs = slice(group * per_group, (group + 1) * per_group)
            if normal.bias and new.pointwise.bias is not None:
                new.pointwise.bias[outputs] = weights[-1].to(new.pointwise.bias.dtype)
                weights = weights[:-1]
            new.pointwise.weight[outputs] = weights.mT[..., None, None].to(new.pointwise.weight.dtype)
    return left / max(float(normal.power.sum()), 1e-30)


def _place(new: ShiftConv2d, group: int, kept: Tensor) -> None:
    """Set the displacements of a group's channels to the kept window positions (channels, taps)."""
    low_y, low_x = (window(size)[0] for size in new.kernel_size)
    width = new.kernel_size[1]
    grid = torch.stack((kept // width + low_y, kept % width + low_x), -1)
    channels = new.in_channels // new.groups
    new.displacement[group * channels : (group + 1) * channels] = grid.to(new.displacement)
