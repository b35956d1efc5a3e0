"""SparsifyChannels: training that empties whole channels, for `PruneChannels` to take out.

What it does. Trains as `FineTune` does, with a penalty on channels: those that have to be removed together, as
`PruneChannels` finds them, share one group lasso over the scales of all their batch norms and over the weights of what
makes them with no batch norm behind it. So units of coupled channels come down together, across residual connections,
until they carry nothing. No channel is removed here. Channels that pass a batch norm without scales are left alone: it
makes good for smaller weights.

When to use it, and when not. Before `PruneChannels`, by bn or by reconstruction, when there is time to train: the
penalty needs many steps to empty channels, and accuracy has to recover meanwhile. With a short budget leave it out and
spend the epochs after `PruneChannels`. Scales can also come down all alike, where a batch norm behind the next layer
makes good for it: `near_zero` in the notes tells, group by group, how many units have come down to a hundredth of what
was usual before. Too strong a pull empties whole blocks, and the accuracy goes with them. Networks whose channels
cannot be followed are refused.

Knobs. Those of `FineTune`, and `l1`: the penalty's weight. What is pulled falls by at most l1 x lr x steps / (2 (1 -
momentum)) in all, with sgd and the cosine, and scales are about 1: take an `l1` with which this comes to 1 or more.
With 390 steps an epoch the defaults come to about 1, in ten epochs; with fewer steps or a smaller `lr`, raise `l1`, and
lower it for longer trainings. `include`, `exclude`: layers whose outputs may shrink, as in `PruneChannels`: give both
the same.

Measured. Not yet measured.

Reference. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017; Fang et al.,
"DepGraph", CVPR 2023, section 3.4; Yuan and Lin, "Model Selection and Estimation in Regression with Grouped
Variables", JRSS B 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from compress.channels.groups import MAKERS, removable
from compress.channels.lasso import ChannelLasso, unit_sizes, unit_squares
from compress.errors import ConfigError
from compress.quantization import is_quantized
from compress.stage import Edit, Site
from compress.surgery import describe, layers, matching, require_change
from compress.task import Task, Work
from compress.train import fit
from compress.training import Training, training_problems

NEAR_ZERO = 0.01  # of the median of its group before training: a unit of this size or less carries nothing


@dataclass(frozen=True)
class SparsifyChannels(Training):
    """Settings of the stage; see the module's card."""

    l1: float = 1e-3
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "channels"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = MAKERS

    def __post_init__(self) -> None:
        problems = training_problems(self)
        if not (math.isfinite(self.l1) and self.l1 > 0):
            problems.append(f"`l1` (={self.l1}) must be a finite number above 0; to train without, use `FineTune`.")
        if problems:
            raise ConfigError("\n".join(problems))

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        if is_quantized(model):
            raise ConfigError(
                "the model is quantized, its batch norms folded away; put `SparsifyChannels`, and `PruneChannels` "
                "behind it, before `Quantize`."
            )
        found = layers(model, self.kinds)
        left_out = matching(list(found), self.include, self.exclude)
        free, reasons = removable(model.eval(), found, left_out, task.example.to(task.device))
        groups = [group for group in free if not group.undone and unit_squares(model, group).requires_grad]
        undone = {member.name: group.undone for group in free if group.undone for member in group.of("out", "same")}
        pulled = {member.name: (group.name, member.units) for group in groups for member in group.of("out", "same")}
        for name in found:
            if name in undone:
                reasons[name] = (
                    f"its channels, or some that go with them, pass {undone[name]}: a batch norm without scales, "
                    "before which weights shrink in vain"
                )
            elif name not in pulled:
                reasons[name] = reasons[name] or "nothing that trains scales its channels"
        texts = {name: describe(layer) for name, layer in found.items()}
        require_change(
            [Site(name, text, None if reasons[name] else text, reasons[name]) for name, text in texts.items()]
        )
        before = {group.name: unit_sizes(model, group) for group in groups}
        trained, history = fit(ChannelLasso(model, groups, self.l1), task, work, self)
        assert isinstance(trained, ChannelLasso)
        bounds = {name: NEAR_ZERO * sizes.median() for name, sizes in before.items()}
        empty = {group.name: unit_sizes(trained.network, group) <= bounds[group.name] for group in groups}
        told = {
            name: {"before": int((sizes <= bounds[name]).sum()), "after": int(empty[name].sum()), "of": len(sizes)}
            for name, sizes in before.items()
        }
        sites = []
        for name, text in texts.items():
            done = None
            if not reasons[name]:
                group, units = pulled[name]
                done = f"{text}, {int(empty[group][units].sum())} of {len(units)} channels near zero"
            sites.append(Site(name, text, done, reasons[name]))
        return Edit(trained.network, tuple(sites), {"near_zero": told, "history": list(history)})
