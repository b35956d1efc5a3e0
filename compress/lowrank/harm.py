"""What lower ranks of one layer do to the network's answers, for all ranks at once, to first order.

Replacing a layer's kernel moves the logits by its Jacobian times the change. The Jacobian in random directions of the
logits, image by image, is one backward pass; the change is a sum over the coefficients that a truncation leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.lowrank.factors import MOST_FEATURES, Shape
from compress.lowrank.ranks import Basis
from compress.reconstruct import require_finite
from compress.substitute import as_convolution, as_map
from compress.windows import windows

DIRECTIONS = 2  # of the logits, for each image
AT_ONCE = 16  # images
MOST_SLOPES = 2**27  # numbers at a time: with wider layers, fewer images
WEIGHED = 2  # so many times `AT_ONCE` images say how much each channel carries


def harms(
    model: nn.Module, layers: Mapping[str, nn.Module], method: str, images: Sequence[Tensor], seed: int
) -> dict[str, Tensor]:
    """For each layer and all choices of its ranks (r, s): the mean squared distance that the logits move.

    The logits' common part, which changes no answer, does not count. All other layers are as they are; the ranks come
    from truncating one decomposition of the kernel, weighted by the channels' covariance. The model is left as it was.
    """
    found = {name: as_convolution(layer) for name, layer in layers.items()}
    shapes = {name: Shape.of(layer, method) for name, layer in found.items()}
    generator = torch.Generator().manual_seed(seed)
    small = [part for batch in images for part in torch.split(batch, AT_ONCE)]
    with _recorded(model, layers) as calls:
        bases = _bases(model, found, shapes, small[:WEIGHED], calls)
        totals = {name: torch.zeros((), dtype=torch.float64) for name in shapes}
        for batch in small:
            logits = _forward(model, batch, calls)
            outputs = [output for name in found for _, output in calls[name]]
            slopes: list[tuple[Tensor, ...]] = []
            for _ in range(DIRECTIONS):
                toward = torch.randn(logits.shape, generator=generator).to(logits)
                toward = toward - toward.mean(1, keepdim=True)
                found_slopes = torch.autograd.grad(logits, outputs, toward, retain_graph=True, allow_unused=True)
                slopes.append(
                    tuple(torch.zeros_like(y) if g is None else g for y, g in zip(outputs, found_slopes, strict=True))
                )
            gradients = (torch.stack(each) for each in zip(*slopes, strict=True))
            for name, layer in found.items():
                total = _moved(layer, layer is layers[name], shapes[name], bases[name], calls[name], gradients)
                totals[name] = totals[name] + total
    for name, total in totals.items():
        require_finite(name, total)
    count = DIRECTIONS * sum(len(batch) for batch in small)
    return {name: total / count for name, total in totals.items()}


def places(
    model: nn.Module, layers: Mapping[str, nn.Module], method: str, example: Tensor
) -> dict[str, tuple[int, int]]:
    """How often, for one image, the weights in front of each layer's core are used, and all others."""
    with torch.no_grad(), _recorded(model, layers) as calls:
        model(example[:1])
    used = {}
    for name, layer in layers.items():
        before = behind = 0
        for x, y in calls[name]:
            height, width = (y if y.dim() == 4 and isinstance(layer, nn.Conv2d) else as_map(y)).shape[2:]
            behind += height * width
            spatial = Shape.of(as_convolution(layer), method).free == (True, False)
            before += height * x.shape[3] if spatial else x.shape[2] * x.shape[3]
        used[name] = before, behind
    return used


Calls = dict[str, list[tuple[Tensor, Tensor]]]


@contextmanager
def _recorded(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """Inputs and outputs of the layers' calls, in a model whose parameters take no gradients meanwhile."""
    calls: Calls = {name: [] for name in layers}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def hook(name: str) -> object:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach().clone()
            calls[name].append((x if isinstance(layers[name], nn.Conv2d) else as_map(x), output))
            return output.clone()  # what comes next may work in place

        return record

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]  # type: ignore[arg-type]  # a hook
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield calls
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        for handle in hooks:
            handle.remove()


def _forward(model: nn.Module, batch: Tensor, calls: Calls) -> Tensor:
    for record in calls.values():
        record.clear()
    with torch.enable_grad():
        logits: Tensor = model(batch.detach().clone().requires_grad_())
    return logits


def _bases(
    model: nn.Module, found: Mapping[str, nn.Conv2d], shapes: Mapping[str, Shape], small: Sequence[Tensor], calls: Calls
) -> dict[str, list[Basis]]:
    """Each group's kernel in the coordinates to truncate in: of very wide layers, as their weights alone have them."""
    covariances: dict[str, Tensor] = {}
    for batch in small:
        with torch.no_grad():
            for record in calls.values():
                record.clear()
            model(batch)
        for name in found:
            for x, _ in calls[name] if shapes[name].channels <= MOST_FEATURES else ():
                channels = _grouped(x, shapes[name].groups).transpose(1, 2).flatten(2)
                more = (channels @ channels.mT).cpu().double()
                covariances[name] = covariances[name] + more if name in covariances else more
    bases = {}
    for name, layer in found.items():
        shape, kernel = shapes[name], shapes[name].kernel(layer)
        if name not in covariances:
            bases[name] = [Basis.of(each, shape) for each in kernel]
            continue
        require_finite(name, covariances[name])
        rows = shape.channels * shape.groups // layer.in_channels  # of the kernel that count as channels
        full = [torch.kron(each, torch.eye(rows, dtype=each.dtype)) for each in covariances[name]]
        bases[name] = [Basis.of(each, shape, covariance) for each, covariance in zip(kernel, full, strict=True)]
    return bases


def _moved(
    layer: nn.Conv2d,
    convolution: bool,
    shape: Shape,
    bases: Sequence[Basis],
    calls: Sequence[tuple[Tensor, Tensor]],
    gradients: Iterator[Tensor],
) -> Tensor:
    """How far the logits move, squared and summed over the images, by the choices of ranks."""
    pairs = [(x, next(gradients)) for x, _ in calls]  # (N, ...) and (D, N, ...)
    step = max(1, MOST_SLOPES // (DIRECTIONS * shape.weights)) if shape.free[0] else AT_ONCE
    moved = torch.zeros(*map(len, shape.choices), dtype=torch.float64)
    for start in range(0, len(pairs[0][0]), step):
        part = slice(start, start + step)
        seen = []
        for x, gradient in pairs:
            wanted = [each if convolution else as_map(each) for each in gradient[:, part]]
            columns = torch.stack([_grouped(each, shape.groups).flatten(3) for each in wanted], 2)
            inputs = x[part]
            if all(shape.free):  # now, while both are small
                inputs = _turned(_grouped(inputs, shape.groups).flatten(3), [basis.first for basis in bases])
                inputs = inputs.transpose(0, 1).reshape(x[part].shape)
                columns = _turned(columns, [basis.last for basis in bases])
            seen.append((_grouped(windows(layer, inputs), shape.groups), columns.flatten(2, 3)))
        each = (_by_slopes if shape.free[0] else _by_outputs)(shape, bases, seen)
        lost = each.sum((2, 3), keepdim=True) - each.cumsum(2).cumsum(3)
        moved += lost.square().sum((0, 1)).cpu().double()
    return moved


def _turned(maps: Tensor, towards: Sequence[Tensor | None]) -> Tensor:
    """Maps (groups, N, ..., channels, L) in the coordinates of each group's matrix (channels, coordinates)."""
    matrices = torch.stack([each.mT for each in towards if each is not None]).to(maps)
    return matrices.view(len(matrices), *(1,) * (maps.dim() - 3), *matrices.shape[1:]) @ maps


Seen = Sequence[tuple[Tensor, Tensor]]  # (G, N, channels * P, L) and (G, N, D * outputs, L), for each call


def _by_slopes(shape: Shape, bases: Sequence[Basis], seen: Seen) -> Tensor:
    """What each coefficient moves the logits by, (N, D, choices of r, choices of s), summed over the groups.

    Where both ranks are free, `seen` is in the bases' coordinates already.
    """
    slopes = _total([x @ columns.mT for x, columns in seen])  # of the directions in the kernel
    slopes = slopes.view(*slopes.shape[:2], shape.channels, shape.positions, DIRECTIONS, shape.outputs)
    parts = []
    for slope, basis in zip(slopes, bases, strict=True):
        core = basis.core.to(slope)
        if all(shape.free):
            parts.append(torch.einsum("nrpds,rps->ndrs", slope, core))
        else:
            assert basis.first is not None
            parts.append(torch.einsum("ncpdt,cr,rpt->ndr", slope, basis.first.to(slope), core).unsqueeze(-1))
    return _total(parts)


def _by_outputs(shape: Shape, bases: Sequence[Basis], seen: Seen) -> Tensor:
    """The same where all channels stay: what each direction of the outputs gets, times what it moves."""
    parts = []
    for x, columns in seen:
        for basis, inputs, gradient in zip(bases, x, columns, strict=True):
            assert basis.last is not None
            given = basis.core.flatten(0, 1).to(inputs).mT @ inputs  # (N, s, L)
            moves = basis.last.to(inputs).mT @ gradient.unflatten(1, (DIRECTIONS, shape.outputs))  # (N, D, s, L)
            parts.append((moves * given.unsqueeze(1)).sum(-1).unsqueeze(2))
    return _total(parts)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) -> (groups, N, C / groups, ...)."""
    return x.reshape(len(x), groups, -1, *x.shape[2:]).transpose(0, 1)
