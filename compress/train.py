"""The only training loop, and evaluation.

What a compressed layer needs during training lives in the layer: its penalty, how its parameters are to be treated,
its rounding. The loop adds `penalty()`, follows `parameter_rules()`, and knows nothing else about compression.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from compress.errors import ConfigError, TrainingError
from compress.files import write
from compress.task import Batches, Task, Work
from compress.training import Training, teacher_of

History = list[dict[str, Any]]


def logits(model: nn.Module, batches: Batches, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's logits (images, classes) and the labels (images,) over all batches, in float32, on the CPU."""
    was_training = model.training
    model.eval()
    outputs, labels = [], []
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for x, y in batches:
            outputs.append(model(_laid_out(x.to(device))).float().cpu())
            labels.append(y.cpu())
    model.train(was_training)
    return torch.cat(outputs), torch.cat(labels)


def divergence(student: Tensor, teacher: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the student's class probabilities from the teacher's, in nats."""
    return float(F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True))


def _channels_last(model: nn.Module) -> nn.Module:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return model


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def fit(model: nn.Module, task: Task, work: Work, settings: Training) -> tuple[nn.Module, History]:
    """Train `model` on `task.train`; gives back the trained model in eval mode and one record for each epoch.

    The state is stored in `work.folder` after each epoch: a run that was killed goes on with the epoch it was in, and
    ends in the same bytes.

    Raises:
        ConfigError: distillation without a base model, frozen batch norm without any.
        TrainingError: the loss or a weight is no longer finite; the last good state stays in `work.folder`.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if settings.batch_norm == "frozen" and not norms:
        raise ConfigError(
            "`batch_norm` (=frozen) has nothing to freeze: the model has no batch norm; leave it at train."
        )
    model = _channels_last(model.to(task.device))
    run = _Run(model, task, settings)
    state = work.folder / "state.safetensors"
    first = run.restore(state) if state.exists() else 0
    steps = len(task.train)
    work.progress.start(f"training, {settings.epochs} epochs", steps * (settings.epochs - first))
    for epoch in range(first, settings.epochs):
        torch.manual_seed(work.seed(task.seed, "noise", epoch))
        started, total, right, seen = time.perf_counter(), 0.0, 0, 0
        model.train()
        if settings.batch_norm == "frozen":
            for norm in norms:
                norm.eval()
        for step, (x, y) in enumerate(task.train.epoch(work.seed(task.seed, "batches", epoch))):
            loss, correct = run.step(x.to(task.device), y.to(task.device), epoch + step / steps)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} in epoch {epoch + 1}, step {step + 1}; {_kept(state, epoch)}. "
                    f"Lower `lr` (={settings.lr}), or set `clip` (={settings.clip}) to 1."
                )
            total, right, seen = total + loss * len(y), right + correct, seen + len(y)
            work.progress.step(f"epoch {epoch + 1}, loss {total / seen:.3f}")
        broken = next((name for name, t in model.state_dict().items() if not bool(t.isfinite().all())), None)
        if broken is not None:
            raise TrainingError(
                f"`{broken}` is no longer finite after epoch {epoch + 1}, step {steps}; {_kept(state, epoch)}. "
                f"Lower `lr` (={settings.lr}), or set `clip` (={settings.clip}) to 1."
            )
        run.end_epoch(epoch, total / seen, right / seen, time.perf_counter() - started)
        run.store(state, epoch + 1)
    work.progress.end()
    return run.result(), run.history


def _kept(state: Path, epochs: int) -> str:
    return f"the state after epoch {epochs} is kept in {state}" if epochs else "no epoch had ended yet"


class _Run:
    """What changes during a training run: the model, the optimizer, the average, the best so far."""

    def __init__(self, model: nn.Module, task: Task, settings: Training) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.history: History = []
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = _optimizer(model, settings)
        self.scales = [group["lr_scale"] for group in self.optimizer.param_groups]
        self.average = copy.deepcopy(model) if settings.average else None
        self.best: dict[str, Tensor] = {}
        self.best_score = -math.inf
        self.wanted: Tensor | None = None  # the teacher's logits on val
        pulled = [module for module in model.modules() if hasattr(module, "penalty")]
        self.penalties = [m for m in pulled if m.penalty().requires_grad]  # type: ignore[operator]  # ours
        self.teacher = teacher_of(settings, task) if settings.distill else None
        if self.teacher is not None:
            _channels_last(self.teacher.to(task.device)).eval()
        elif settings.distill:
            raise ConfigError(
                f"`distill` (={settings.distill}) needs a base to learn from; give a `teacher`, or set it to 0 here."
            )

    def step(self, x: Tensor, y: Tensor, epoch: float) -> tuple[float, int]:
        """One optimizer step; gives back the loss and how many images were classified correctly."""
        x = _laid_out(x)
        lr = self.settings.lr * _schedule(epoch, self.settings)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale
        with self._autocast():
            output = self.model(x)
            with torch.no_grad():
                target = self.teacher(x) if self.teacher is not None else None
        output = output.float()
        loss = self._loss(output, y, None if target is None else target.float())
        value = loss.item()
        if math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            if self.settings.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
            self.optimizer.step()
            if self.average is not None:
                _blend(self.average, self.model, self.settings.average)
        return value, int((output.argmax(1) == y).sum())

    def _loss(self, output: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        loss = F.cross_entropy(output, y, label_smoothing=self.settings.label_smoothing)
        if target is not None:
            t, share = self.settings.temperature, self.settings.distill
            soft = F.kl_div(
                F.log_softmax(output / t, 1), F.log_softmax(target / t, 1), reduction="batchmean", log_target=True
            )
            loss = (1 - share) * loss + share * t * t * soft
        for module in self.penalties:
            loss = loss + module.penalty()  # type: ignore[operator]  # ours; nn.Module attributes are untyped
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=self.task.precision == "bfloat16")

    def end_epoch(self, epoch: int, loss: float, accuracy: float, seconds: float) -> None:
        """Record the epoch; with `keep: best` also evaluate it on val, by divergence where the base has seen val."""
        record: dict[str, Any] = {"epoch": epoch + 1, "loss": loss, "train_top1": 100 * accuracy, "val_top1": None}
        record |= {"lr": self.settings.lr * _schedule(float(epoch), self.settings), "seconds": seconds}
        if self.settings.keep == "best":
            kept = self._settled()
            outputs, labels = logits(kept, self.task.val, self.task.device)
            record["val_top1"] = 100 * float((outputs.argmax(1) == labels).float().mean())
            score = record["val_top1"]
            if self.task.val_seen and self.task.teacher is not None:
                if self.wanted is None:
                    self.wanted = logits(self.task.teacher, self.task.val, self.task.device)[0]
                score = -divergence(outputs, self.wanted)
            if score > self.best_score:
                self.best_score = score
                self.best = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
        self.history.append(record)

    def result(self) -> nn.Module:
        """The model to go on with: the last epoch's, the averaged or the best one."""
        model = self._settled()
        if self.best:
            model.load_state_dict(self.best)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing in torch's stubs
        return model.eval()

    def _settled(self) -> nn.Module:
        """The model as it would be kept now. Parametrizations that follow their weights get to see the last step."""
        model = self.model if self.average is None else self.average
        model.train()
        with torch.no_grad():
            for module in model.modules():
                if parametrize.is_parametrized(module):
                    for name in dict(module.named_children())["parametrizations"]._modules:
                        getattr(module, name)
        return model

    def store(self, path: Path, epochs: int) -> None:
        """Write everything that the next epoch depends on; the old file is replaced at once or not at all."""
        tensors: dict[str, Tensor] = {}
        for part, module in (("model", self.model), ("average", self.average)):
            if module is not None:
                tensors |= {f"{part}/{name}": tensor for name, tensor in module.state_dict().items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{self.names[id(parameter)]}/{key}"] = value
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        notes = {"epochs": epochs, "history": self.history, "best_score": self.best_score}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write(path, safetensors.torch.save(tensors, {"run": json.dumps(notes)}))

    def restore(self, path: Path) -> int:
        """Go on from a stored state; gives back the number of epochs it has behind it."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}, "best": {}}
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["run"])
            for name in file.keys():  # noqa: SIM118 - not a dict
                part, _, rest = name.partition("/")
                parts[part][rest] = file.get_tensor(name)
        self.model.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        parameters = {name: p for p_id, name in self.names.items() for p in self._parameters() if id(p) == p_id}
        for name, tensor in parts["optimizer"].items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            if tensor.dim():
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            self.optimizer.state[parameter][key] = tensor
        self.best, self.best_score = parts["best"], notes["best_score"]
        self.history = notes["history"]
        return int(notes["epochs"])

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])


def _schedule(epoch: float, settings: Training) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero, or two steps down."""
    if epoch < settings.warmup_epochs:
        return (epoch + 1e-2) / settings.warmup_epochs
    if settings.schedule == "step":
        return 0.1 ** sum(epoch >= share * settings.epochs for share in (0.5, 0.75))
    left = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / left)) / 2


def _optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; weights decay, vectors (biases, norms) do not, modules' own rules win."""
    rules: dict[int, dict[str, float]] = {}
    for module in model.modules():
        if hasattr(module, "parameter_rules"):
            for name, rule in module.parameter_rules().items():  # type: ignore[operator]  # ours
                rules[id(getattr(module, name))] = rule
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rule = rules.get(id(parameter), {})
            decay = rule.get("weight_decay", settings.weight_decay if parameter.dim() > 1 else 0.0)
            groups.setdefault((rule.get("lr_scale", 1.0), decay), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay, "lr": settings.lr * scale}
        for (scale, decay), parameters in groups.items()
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(listed, fused=True)
    momentum = settings.momentum
    return torch.optim.SGD(listed, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=True)


def _blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average a little towards the model; whole-number buffers are copied."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs.to(mine.dtype), 1 - decay)
            else:
                mine.copy_(theirs)
