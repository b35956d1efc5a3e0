"""Small networks, one for each way in which channels depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.models import as_net, small
from compress.models.mobilenet import InvertedResidual


class Around(nn.Module):
    """A stem, something around two convolutions, and a linear layer."""

    def __init__(self, around: Callable[[Any, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.around = around
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.around(self, self.stem(x).relu())
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]  # calls of modules are untyped


class Concatenated(nn.Module):
    """Two branches side by side, read by a batch norm and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 1)
        self.three = nn.Conv2d(8, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(20)
        self.last = nn.Conv2d(20, 8, 3, padding=1, bias=False)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(torch.cat((self.one(x), self.three(x)), 1)))
        out: Tensor = self.linear(F.relu(self.last(x)).mean((2, 3)))
        return out


class Gated(nn.Module):
    """Squeeze-and-excitation: the gate reads what it scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 12, 3, padding=1)
        self.fc1 = nn.Conv2d(12, 4, 1)
        self.fc2 = nn.Conv2d(4, 12, 1)
        self.conv2 = nn.Conv2d(12, 8, 3)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        out: Tensor = self.linear(F.relu(self.conv2(x)).mean((2, 3)))
        return out


def grouped() -> nn.Module:
    convolutions = (nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))


def flat() -> nn.Module:
    first = (nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*first, nn.Dropout(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 3))


def residual() -> nn.Module:
    return small(3, 2)


def mobile() -> nn.Module:
    blocks = (InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 2), InvertedResidual(12, 12, 1, 2))
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *blocks, nn.ReLU(), nn.Flatten(), nn.Linear(192, 3))


def shifted() -> nn.Module:
    return as_net(8, 2, 3, 2, 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "concatenated": Concatenated,
    "gated": Gated,
    "grouped": grouped,
    "flat": flat,
    "mobile": mobile,
    "shifted": shifted,
}


def net(name: str, seed: int = 0) -> nn.Module:
    """The network, with statistics that are not those of a fresh one, ready to answer."""
    torch.manual_seed(seed)
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]  # a tensor
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


@torch.no_grad()
def silence_odd_channels(model: nn.Module) -> None:
    """Every second channel that a hidden layer makes becomes zero, and stays zero through norms."""
    made = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in made[:-1]:
        module.weight[1::2] = 0
        if module.bias is not None:
            module.bias[1::2] = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.zero_()
            module.running_mean.zero_()  # type: ignore[union-attr]  # a tensor
