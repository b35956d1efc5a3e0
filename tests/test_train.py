"""The training loop: against a bare loop, killed and resumed, and when it goes wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import noise_task
from safetensors import safe_open
from torch import nn

import compress
from compress import checkpoint
from compress.errors import ConfigError, TrainingError
from compress.models import small
from compress.nn.shift import ShiftConv2d
from compress.stages import FineTune
from compress.store import files_of
from compress.task import Task, Work
from compress.train import divergence, fit, logits
from compress.training import mixed


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(378, 3)
    )


def state(trained: nn.Module) -> bytes:
    return b"".join(t.contiguous().numpy().tobytes() for t in trained.state_dict().values())


def test_equals_a_bare_loop(tmp_path: Path) -> None:
    task, work = noise_task(), Work(tmp_path, lineage="k")
    settings = FineTune(epochs=2, lr=0.1, warmup_epochs=0.0, weight_decay=0.01, clip=1.0, label_smoothing=0.1)
    mine, bare = model(), model().to(memory_format=torch.channels_last)
    trained, history = fit(mine, task, work, settings)
    decayed = [p for p in bare.parameters() if p.dim() > 1]
    others = [p for p in bare.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for epoch in range(2):
        torch.manual_seed(work.seed(0, "noise", epoch))
        bare.train()
        for step, (x, y) in enumerate(task.train.epoch(work.seed(0, "batches", epoch))):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 + math.cos(math.pi * (epoch + step / 2) / 2)) / 2
            optimizer.zero_grad()
            F.cross_entropy(bare(x.contiguous(memory_format=torch.channels_last)), y, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()
    for ours, theirs in zip(trained.state_dict().values(), bare.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [record["epoch"] for record in history] == [1, 2]


class Killed(Exception):
    pass


class Breaks:
    """Training batches that stop short in the middle of an epoch, as a killed process does."""

    def __init__(self, batches: Any, epoch: int) -> None:
        self.batches, self.left, self.images = batches, epoch, batches.images

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, seed: int):  # type: ignore[no-untyped-def]
        for number, batch in enumerate(self.batches.epoch(seed)):
            if self.left == 0 and number == 1:
                raise Killed
            yield batch
        self.left -= 1


@pytest.mark.parametrize(
    "settings",
    [
        FineTune(epochs=4, lr=0.05),
        FineTune(epochs=4, lr=0.01, optimizer="adamw", average=0.9, distill=0.5),
        FineTune(epochs=4, lr=0.05, keep="best"),
        FineTune(epochs=4, lr=0.05, mixup=0.4),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_killed_and_resumed_ends_in_the_same_bytes(settings: FineTune, at: int, tmp_path: Path) -> None:
    task = replace(noise_task(), precision="bfloat16", teacher=model(seed=3).eval())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    whole, history = fit(model(), task, Work(tmp_path / "a", lineage="k"), settings)
    broken = replace(task, train=Breaks(task.train, at))
    with pytest.raises(Killed):
        fit(model(), broken, Work(tmp_path / "b", lineage="k"), settings)
    again, later = fit(model(), task, Work(tmp_path / "b", lineage="k"), settings)
    assert state(again) == state(whole)
    assert [r["loss"] for r in later] == [r["loss"] for r in history]


def test_what_ran_before_does_not_matter(tmp_path: Path) -> None:
    ended = []
    for number, (drawn, key) in enumerate(((0, "k"), (17, "k"), (0, "another"))):
        (tmp_path / str(number)).mkdir()
        net = model()
        torch.rand(drawn)
        ended.append(state(fit(net, noise_task(), Work(tmp_path / str(number), lineage=key), FineTune(epochs=1))[0]))
    assert ended[0] == ended[1] != ended[2]


def test_training_that_turns_to_nan_says_where_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    task = noise_task()
    good = task.train

    class Poisoned(Breaks):
        def epoch(self, seed: int):  # type: ignore[no-untyped-def]
            for number, (x, y) in enumerate(self.batches.epoch(seed)):
                yield (x * math.nan if self.left == 0 and number == 1 else x), y
            self.left -= 1

    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 2, step 2; the state after epoch 1 is kept"):
        fit(model(), replace(task, train=Poisoned(good, 1)), Work(tmp_path, lineage="k"), FineTune(epochs=3))
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["run"])["epochs"] == 1
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118 - no dict


def test_displacements_have_their_own_rate_and_penalty(tmp_path: Path) -> None:
    layer = ShiftConv2d(8, 6, 3, 2, learn=True, quantize=False, l1=1e3)
    layer.displacement.data.fill_(0.5)
    layer.pointwise.weight.data.zero_()
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(378, 3))
    net[2].weight.data.zero_()
    fit(net, noise_task(), Work(tmp_path), FineTune(epochs=1, lr=1e-3, momentum=0.0, warmup_epochs=0.0))
    # Two steps of l1 x lr x 0.01 towards zero, the second at half the rate; the loss itself has no gradient here.
    torch.testing.assert_close(layer.displacement, torch.full_like(layer.displacement, 0.5 - 1e-2 * 1.5))


def test_steps_down_after_half_and_three_quarters(tmp_path: Path) -> None:
    settings = FineTune(epochs=8, schedule="step", warmup_epochs=0.0, lr=0.1)
    _, history = fit(model(), noise_task(), Work(tmp_path), settings)
    assert [record["lr"] for record in history] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale(tmp_path: Path) -> None:
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fit(net, noise_task(), Work(tmp_path), FineTune(epochs=1, batch_norm="frozen"))
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(net.state_dict()[name], before[name])
    assert not torch.equal(net.state_dict()["1.weight"], before["1.weight"])


def test_distillation_alone_follows_the_teacher(tmp_path: Path) -> None:
    teacher = model(seed=5).eval()
    task = replace(noise_task(), teacher=teacher)
    student = model()
    wanted, _ = logits(teacher, task.test, task.device)
    before = divergence(logits(student, task.test, task.device)[0], wanted)
    trained, _ = fit(student, task, Work(tmp_path), FineTune(epochs=20, lr=0.02, distill=1.0))
    assert divergence(logits(trained, task.test, task.device)[0], wanted) < 0.3 * before
    assert divergence(wanted, wanted) == pytest.approx(0, abs=1e-7)


def saved(path: Path, seed: int, mean: float = 0.0, classes: int = 3) -> str:
    """A checkpoint of a network whose images are prepared as those of `noise_task`, but for `mean`."""
    build = ("compress.models.small", {"classes": classes, "channels": 8})
    torch.manual_seed(seed)
    net = small(classes=classes, channels=8).eval()
    input = {**noise_task().input, "mean": [mean] * 8}
    checkpoint.save(net, path, build=build, input=input, provenance={}, results={}, form="training")
    return str(path)


def test_a_teacher_from_a_file_is_followed_instead_of_the_base(tmp_path: Path) -> None:
    task = replace(noise_task(), teacher=model(seed=5).eval())
    file = saved(tmp_path / "teacher.safetensors", seed=7)
    wanted, _ = logits(compress.load(file), task.test, task.device)
    before = divergence(logits(model(), task.test, task.device)[0], wanted)
    trained, _ = fit(model(), task, Work(tmp_path), FineTune(epochs=20, lr=0.02, distill=1.0, teacher=file))
    assert divergence(logits(trained, task.test, task.device)[0], wanted) < 0.3 * before
    digests = [files_of(FineTune(epochs=1, distill=1.0, teacher=file))]
    saved(tmp_path / "teacher.safetensors", seed=8)
    digests.append(files_of(FineTune(epochs=1, distill=1.0, teacher=file)))
    assert digests[0] != digests[1] and not files_of(FineTune())


def test_a_teacher_that_does_not_fit(tmp_path: Path) -> None:
    for name, more, message in (
        ("darker", {"mean": 0.5}, "must take its images as this network does; it takes"),
        ("wider", {"classes": 5}, "must tell 3 classes apart, as the data does; it has 5"),
    ):
        file = saved(tmp_path / f"{name}.safetensors", 0, **more)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            fit(model(), noise_task(), Work(tmp_path), FineTune(epochs=1, distill=1.0, teacher=file))


def test_logits_are_in_float32_and_leave_the_mode_alone() -> None:
    task: Task = noise_task()
    net = model().train()
    outputs, labels = logits(net, task.test, task.device)
    assert outputs.dtype == torch.float32 and outputs.shape == (32, 3) and labels.shape == (32,)
    assert net.training
    net.eval()
    torch.testing.assert_close(outputs, net(task.test.x))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": "no.safetensors", "distill": 1.0},
            r"`teacher` \(=no.safetensors\) must be a checkpoint, and there",
        ),
        ({"teacher": __file__}, r"has no say with `distill: 0`; raise it, or drop `teacher`"),
        ({"epochs": 0}, r"`epochs` \(=0\) must be at least 1; to train nothing, leave the stage out"),
        ({"lr": 0.0}, r"`lr` \(=0.0\) must be above 0"),
        ({"lr": math.inf}, r"`lr` \(=inf\) must be above 0"),
        ({"distill": 1.5}, r"`distill` \(=1.5\) must be between 0 and 1"),
        ({"clip": -1.0}, r"`clip` \(=-1.0\) must be 0 or more"),
        ({"optimizer": "lion"}, r"`optimizer` \(=lion\) must be one of sgd, adamw"),
        ({"keep": "first"}, r"`keep` \(=first\) must be one of last, best"),
        ({"epochs": 2, "warmup_epochs": 3.0}, r"`warmup_epochs` \(=3.0\) must be between 0 and 2"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTune(**settings)


def test_mixup_lays_each_image_over_another_of_the_batch_and_its_label_too() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 1])
    shares = set()
    for _ in range(3):
        images, labels = mixed(x, y, 3, 1.0)
        share = labels[0, 0]  # of image 0, the other being image 3, whose label is 1
        torch.testing.assert_close(labels[0], torch.stack((share, 1 - share, torch.zeros(()))))
        torch.testing.assert_close(images[0], share * x[0] + (1 - share) * x[3])
        shares.add(round(float(share), 4))
    assert len(shares) == 3  # drawn anew for each batch
