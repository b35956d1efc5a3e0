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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from compress import optimizer
from compress.compiled import Compiled
from compress.errors import ConfigError, TrainingError
from compress.files import write
from compress.graphed import GraphedStep
from compress.pruning import require_an_end
from compress.task import Batches, Task, Work
from compress.training import Training, answering, mixed, teacher_of

History = list[dict[str, Any]]
LOOK_STEPS = 50  # on a GPU, how many steps there are from one look at the loss to the next


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
    ends in the same bytes. (On a GPU too, but for networks with max pools that overlap or padding that reflects: there
    torch adds up their gradients in any order.)

    Raises:
        ConfigError: distillation without a base model, frozen batch norm without any, `keep: best` where a schedule of
            `Prune` ends in no epoch.
        TrainingError: the loss or a weight is no longer finite; the last good state stays in `work.folder`.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if settings.batch_norm == "frozen" and not norms:
        raise ConfigError(
            "`batch_norm` (=frozen) has nothing to freeze: the model has no batch norm; leave it at train."
        )
    if settings.keep == "best":
        require_an_end(model, settings.epochs, len(task.train))
    model = _channels_last(model.to(task.device))
    run = _Run(model, task, settings)
    state = work.folder / "state.safetensors"
    first = run.restore(state) if state.exists() else 0
    steps = len(task.train)
    work.progress.start(f"training, {settings.epochs} epochs", steps * (settings.epochs - first))
    for epoch in range(first, settings.epochs):
        torch.manual_seed(work.seed(task.seed, "noise", epoch))
        started, tally = time.perf_counter(), _Tally(settings, state, epoch)
        model.train()
        if settings.batch_norm == "frozen":
            for norm in norms:
                norm.eval()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for step, (x, y) in enumerate(task.train.epoch(work.seed(task.seed, "batches", epoch))):
                loss, correct = run.step(x.to(task.device), y.to(task.device), epoch + step / steps)
                tally.add(loss, correct, len(y))
                work.progress.step(tally.text)
        tally.check()
        broken = next((name for name, t in model.state_dict().items() if not bool(t.isfinite().all())), None)
        if broken is not None:
            raise tally.error(f"`{broken}` is no longer finite after epoch {epoch + 1}, step {steps}")
        run.end_epoch(epoch, tally.loss, tally.accuracy, time.perf_counter() - started)
        run.store(state, epoch + 1)
    work.progress.end()
    return run.result(), run.history


class _Tally:
    """Loss and hits of an epoch. To look at them, the CPU waits for a GPU, so there that is done now and then only."""

    def __init__(self, settings: Training, state: Path, epoch: int) -> None:
        self.settings, self.state, self.epoch = settings, state, epoch
        self.steps, self.seen, self.right, self.total = 0, 0, 0, 0.0
        self.waiting: list[tuple[Tensor, Tensor, int]] = []
        self.text = f"epoch {epoch + 1}"

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        self.waiting.append((loss, correct, images))
        if len(self.waiting) >= (1 if loss.device.type == "cpu" else LOOK_STEPS):
            self.check()

    def check(self) -> None:
        """Look at what has come in; raise `TrainingError` where a loss is not finite."""
        if not self.waiting:
            return
        losses = torch.stack([loss for loss, _, _ in self.waiting]).tolist()
        hits = torch.stack([correct for _, correct, _ in self.waiting]).tolist()
        for loss, correct, (_, _, images) in zip(losses, hits, self.waiting, strict=True):
            self.steps += 1
            if not math.isfinite(loss):
                raise self.error(f"the loss became {loss} in epoch {self.epoch + 1}, step {self.steps}")
            self.total, self.right, self.seen = self.total + loss * images, self.right + correct, self.seen + images
        self.waiting.clear()
        self.text = f"epoch {self.epoch + 1}, loss {self.loss:.3f}"

    def error(self, what: str) -> TrainingError:
        kept = f"the state after epoch {self.epoch} is kept in {self.state}" if self.epoch else "no epoch had ended yet"
        return TrainingError(
            f"{what}; {kept}. Lower `lr` (={self.settings.lr}), or set `clip` (={self.settings.clip}) to 1."
        )

    @property
    def loss(self) -> float:
        return self.total / self.seen

    @property
    def accuracy(self) -> float:
        return self.right / self.seen


class _Run:
    """What changes during a training run: the model, the optimizer, the average, the best so far."""

    def __init__(self, model: nn.Module, task: Task, settings: Training) -> None:
        self.model, self.task, self.settings = model, task, settings
        self.history: History = []
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = optimizer.make(model, settings)
        self.average = copy.deepcopy(model) if settings.average else None
        self.best: dict[str, Tensor] = {}
        self.best_score = -math.inf
        self.wanted: Tensor | None = None  # the teacher's logits on val
        pulled = [module for module in model.modules() if hasattr(module, "penalty")]
        self.penalties = [m for m in pulled if m.penalty().requires_grad]  # type: ignore[operator]  # ours
        self.answer: Callable[[Tensor], Tensor] = Compiled(model) if settings.compile else model
        self.teacher: Callable[[Tensor], Tensor] | None = None
        if settings.distill:
            teacher = teacher_of(settings, task)
            if teacher is None:
                what = f"`distill` (={settings.distill}) needs a base to learn from"
                raise ConfigError(f"{what}; give a `teacher`, or set it to 0 here.")
            teacher = _channels_last(answering(teacher, task)).eval()
            self.teacher = Compiled(teacher) if settings.compile else teacher
        self.update = GraphedStep(self._update, model) if task.device.type == "cuda" else self._update

    def step(self, x: Tensor, y: Tensor, epoch: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; gives back the loss and how many images were classified correctly."""
        optimizer.set_rate(self.optimizer, self.settings.lr * optimizer.schedule(epoch, self.settings))
        if self.settings.mixup:
            x, y = mixed(x, y, self.task.classes, self.settings.mixup)
        return self.update(_laid_out(x), y)

    def _update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            output = self.answer(x)
            with torch.no_grad():
                target = self.teacher(x) if self.teacher is not None else None
        output = output.float()
        loss = self._loss(output, y, None if target is None else target.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        if self.average is not None:
            optimizer.blend(self.average, self.model, self.settings.average)
        return loss.detach(), (output.argmax(1) == (y if y.dim() == 1 else y.argmax(1))).sum()

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
        """Record the epoch; with `keep: best` also evaluate it on val, by divergence where the base has seen val.

        An epoch is not the best where a module still `waits` for the end of a schedule.
        """
        record: dict[str, Any] = {"epoch": epoch + 1, "loss": loss, "train_top1": 100 * accuracy, "val_top1": None}
        record |= {"lr": self.settings.lr * optimizer.schedule(float(epoch), self.settings), "seconds": seconds}
        if self.settings.keep == "best":
            kept = self._settled()
            outputs, labels = logits(kept, self.task.val, self.task.device)
            record["val_top1"] = 100 * float((outputs.argmax(1) == labels).float().mean())
            score = record["val_top1"]
            if self.task.val_seen and self.task.teacher is not None:
                if self.wanted is None:
                    base = self.task.teacher.to(self.task.device)
                    self.wanted = logits(base, self.task.val, self.task.device)[0]
                score = -divergence(outputs, self.wanted)
            waits = any(getattr(module, "waits", False) for module in kept.modules())
            if score > self.best_score and not waits:
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
            tensor = tensor.to(parameter.device)
            self.optimizer.state[parameter][key] = tensor
        self.best, self.best_score = parts["best"], notes["best_score"]
        self.history = notes["history"]
        return int(notes["epochs"])

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])
