"""FreezeRanges: the scales of a quantized model stay where they are from here on.

What it does. Every grid whose scale still moves in training, because it follows the largest weight or is learned by
gradient, is fixed. The output does not change. Weights and biases go on being trained.

When to use it, and when not. Between two fine-tunings of a quantized model: the last epochs then settle on integers of
a grid that stands still. Activation ranges stand still anyway unless `Quantize` was told to `learn` them.

Knobs. `include`, `exclude`: layers by name pattern; ranges of activations are fixed where all layers are.

Measured. Not yet measured.

Reference. Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from compress.errors import ConfigError
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stage import Edit, Site
from compress.surgery import describe, layers_and_ours, matching, require_change
from compress.task import Task, Work


@dataclass(frozen=True)
class FreezeRanges:
    """Settings of the stage; see the module's card."""

    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "correct"
    needs: ClassVar[tuple[str, ...]] = ("Quantize", "MixedPrecision")
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    ours: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = layers_and_ours(model, self.kinds)
        kept = matching(list(found), self.include, self.exclude)
        ranges = [module for module in model.modules() if isinstance(module, FakeQuantize)]
        grids = {
            name: [m for m in layer.modules() if isinstance(m, FakeQuantizeWeight)] for name, layer in found.items()
        }
        if not ranges and not any(grids.values()):
            raise ConfigError("the model is not quantized; put `FreezeRanges` behind `Quantize`.")
        for name in found:
            if not kept[name] and not grids[name]:
                kept[name] = "it has no quantized weights"
            elif not kept[name] and all(grid.step == "fixed" for grid in grids[name]):
                kept[name] = "its scales are fixed already"
        sites = tuple(
            Site(name, describe(layer), None if kept[name] else "scales fixed", kept[name])
            for name, layer in found.items()
        )
        learned = [] if self.include or self.exclude else [module for module in ranges if module.learn]
        if not learned:
            require_change(sites)
        for name in found:
            if not kept[name]:
                for grid in grids[name]:
                    grid.fix()
        for module in learned:
            module.fix()
        return Edit(model, sites, {"activation_ranges_fixed": len(learned)})
