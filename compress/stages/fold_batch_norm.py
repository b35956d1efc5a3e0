"""FoldBatchNorm: batch norms become part of the convolutions in front of them.

What it does. Each `BatchNorm2d` that alone reads the output of one convolution gives it its scale and its shift, from
the running statistics, and becomes `Identity`. The network computes what it computed in evaluation mode, up to float
rounding.

When to use it, and when not. Where what follows should see the weights as they will be used: in front of pruning or
clustering, whose choices depend on the weights' sizes. `Quantize` and `Equalize` fold by themselves, and so does every
export, so most recipes do without it. It belongs behind training: a network trains without batch norm too, but nothing
holds the scale of its activations any more, so take a small `lr` (1e-3 or less) and `clip: 1`. Norms that stand
elsewhere (in front of a convolution, behind a sum) stay, and so do all of a model that cannot be traced.

Knobs. None.

Measured. Not yet measured.

Reference. Jacob et al., CVPR 2018, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compress.lower.fold import fold_or_keep
from compress.stage import Edit, Site
from compress.surgery import describe, layers, require_change
from compress.task import Task, Work


@dataclass(frozen=True)
class FoldBatchNorm:
    """The stage has no settings; see the module's card."""

    kind: ClassVar[str] = "fold"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.BatchNorm2d,)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        before = {name: describe(norm) for name, norm in layers(model, self.kinds).items()}
        pairs, kept = fold_or_keep(model)
        into = {norm: convolution for convolution, norm in pairs}
        sites = tuple(
            Site(name, text, None, kept[name]) if name in kept else Site(name, text, f"part of {into[name]}")
            for name, text in before.items()
        )
        require_change(sites)
        return Edit(model, sites, {"folded": len(pairs), "kept": len(kept)})
