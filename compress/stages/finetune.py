"""FineTune: train the model as it stands, between stages or after them.

What it does. Trains on the task's augmented images, with cross-entropy and, with `distill`, the base model's answers.
Rounding, displacements, masks and the like live in the layers, so that after `Quantize` this is quantization-aware
training.

When to use it, and when not. After every stage that costs accuracy. With 1,000 images and no labels to trust, use
`distill: 1`.

Knobs. `epochs`; `lr` (peak, after a linear warm-up over `warmup_epochs`); `schedule`: cosine (down to zero) or step (a
tenth after half of the epochs, a hundredth after three quarters: what papers before 2018 train with); `optimizer`: sgd
(Nesterov, `momentum`) or adamw; `weight_decay` (weights only); `label_smoothing`; `mixup`: images are laid over each
other in shares of Beta(mixup, mixup), for long trainings that would learn the images by heart, 0 is off; `distill`:
share of the loss that is the divergence from the base's answers at `temperature`; `teacher`: a checkpoint (of a larger
network, say) whose answers are learned in place of the base's; `clip`: bound on the gradient's norm, 0 is off;
`average`: decay of a moving average of the weights, which is then what is kept, 0 is off; `keep`: last or best (on
val); `batch_norm`: train, or frozen, which computes with the stored statistics: for small batches, and for networks
whose file has the statistics merged into scale and bias (the published Active Shift networks); `compile`: train by
kernels that `torch.compile` makes first, which takes half a minute and pays in long trainings on a GPU. After
`Quantize` batch norm is folded away, and nothing holds the weights' scale any more: take `lr: 1e-3` or less, and
`clip: 1`.

Measured. Throughput: `benchmarks/throughput.py`. Long trainings on a GPU, compiled: `benchmarks/long_budgets.py`.

Reference. Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. With `mixup`, teacher and
student see the same images: Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent", CVPR
2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compress.errors import ConfigError
from compress.lower.tensors import round_biases
from compress.stage import Edit
from compress.task import Task, Work
from compress.train import fit
from compress.training import Training, training_problems


@dataclass(frozen=True)
class FineTune(Training):
    """Settings of the stage; see the module's card."""

    kind: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        problems = training_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        model, history = fit(model, task, work, self)
        round_biases(model)
        return Edit(model, notes={"history": list(history)})
