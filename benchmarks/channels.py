"""Half of ResNet-56's multiply-adds without whole channels, by us and by torch-pruning alone: `channels.py [ROW ...]`.

The recipe `channels`, and the same with torch-pruning's own pruner in place of our stages: the L1 norm of each
channel's weights, the same share of the channels inside every residual block, nothing solved anew. `ours-l1` removes by
that norm too. The same fine-tuning follows. What is computed is kept in `outputs/benchmarks/channels`: run again, a row
only measures the times anew, which is to be done when nothing else runs. `ROW=FOLDER` takes the row from a run that
ended in this folder, on a machine with a GPU say, and measures only its times.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common import ROOT, cifar, compress, figures, finished, rows_by_name
from torch import nn

from compress.errors import ConfigError
from compress.measure import profile
from compress.stage import Edit
from compress.task import Task, Work

MODEL, MACS = "resnet56", 0.47
ROWS: dict[str, tuple[str, ...]] = {  # name -> what differs from the recipe
    "ours": (),
    "ours-l1": ("stages.blocks.by=l1", "stages.channels.by=l1"),
    "torch-pruning": ("~stages.blocks", "stages.channels={_target_:channels.TorchPruning}"),
}
SHARES = [share / 100 for share in range(2, 98, 2)]  # of the channels of each block


@dataclass(frozen=True)
class TorchPruning:
    """torch-pruning by itself, down to at most `macs` of the multiply-adds; published ResNets for CIFAR only."""

    macs: float = MACS

    kind: ClassVar[str] = "channels"

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        import torch_pruning

        example = task.example[:1].cpu()
        most = self.macs * profile(model, example).macs
        for share in SHARES:
            thin = copy.deepcopy(model).cpu()
            # what the shortcuts add is one stream: as in the published comparisons only what is inside a block goes
            inside = [m for n, m in thin.named_modules() if n.startswith("layer") and n.endswith("conv1")]
            kept = [m for m in thin.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inside]
            importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
            torch_pruning.pruner.MagnitudePruner(
                thin, example, importance=importance, pruning_ratio=share, ignored_layers=kept
            ).step()
            if profile(thin, example).macs <= most:
                return Edit(thin.to(task.device), notes={"share": share})
        raise ConfigError(f"`macs` (={self.macs}) is less than what {SHARES[-1]} of the channels leave.")


def run(name: str, ended: str) -> dict[str, Any]:
    row = {"name": name, "settings": list(ROWS[name])}
    if ended:
        return row | figures(finished(Path(ended), "channels", MODEL, ROWS[name]))
    folder = ROOT / "outputs" / "benchmarks" / "channels"
    folder.mkdir(parents=True, exist_ok=True)
    report, _ = compress(folder, "recipe=channels", *ROWS[name], *cifar(MODEL), out=name)
    return row | figures(report)


if __name__ == "__main__":
    rows_by_name("channels", ROWS, run, model=MODEL, data="CIFAR-10, 10,000 test images", seed=0)
