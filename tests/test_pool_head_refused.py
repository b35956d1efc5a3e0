"""Fully connected heads that cannot be replaced by a pooled one, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_pool_head import OUTPUTS, Averaged, pooled
from torch import Tensor, nn

from compress.errors import ConfigError


class Odd(nn.Module):
    """Heads that cannot be replaced."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(8, 6, 3)
        self.fc1, self.fc2 = nn.Linear(378, 378), nn.Linear(378, OUTPUTS)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).flatten(1)
        if self.how == "dropout":
            x = F.dropout(self.fc1(x), training=self.training)
        elif self.how == "tanh":
            x = torch.tanh(self.fc1(x))
        elif self.how == "residual":
            x = self.fc1(x) + x
        elif self.how == "in place":
            x = F.relu(self.fc1(x), inplace=True)
        elif self.how == "twice":
            x = self.fc1(self.fc1(x))
        elif self.how == "view":
            x = self.fc1(x).view(-1, 378)
        elif self.how == "two":
            return self.fc2(x), x
        elif self.how == "read":
            x = self.fc1(x)
            return self.fc2(self.fc1.weight.sum() * 0 + x) if self.training else self.fc2(x)
        elif self.how == "sum":
            return self.fc2(x) + x[:, :3]
        return self.fc2(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "functional dropout": (lambda: Odd("dropout"), "cannot be seen: .*depends on the training mode; use a module"),
    "another function": (lambda: Odd("tanh"), r"`tanh` stands in front of fc2, where a flattened map should be"),
    "joined": (lambda: Odd("residual"), r"`add` stands in front of fc2, where a flattened map should be"),
    "two outputs": (lambda: Odd("two"), "there is no `Linear` through which everything in the output goes"),
    "a sum of outputs": (lambda: Odd("sum"), "there is no `Linear` through which everything in the output goes"),
    "a layer used twice": (lambda: Odd("twice"), "fc1 is used in several places"),
    "in place": (lambda: Odd("in place"), "`relu` stays and works in place, where it would now change the map itself"),
    "reshaped in the middle": (lambda: Odd("view"), "`view` stands between its layers"),
    "another forward in training": (lambda: Odd("read"), "something else in training mode"),
    "reordered": (lambda: Averaged(nn.Linear(378, 3), how="permute"), "`permute` reorders the map"),
    "concatenated": (lambda: Averaged(nn.Linear(756, 3), how="cat"), r"`cat` stands in front of head\.0"),
    "averaged": (lambda: Averaged(nn.Linear(6, 3)), r"one linear layer \(head\.0\) behind a map of one position"),
    "no map": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(792, 9), nn.ReLU(), nn.Linear(9, 3)),
        "no layer with weights comes before 1, so there is no map to average",
    ),
    "at the root": (lambda: nn.Linear(11, 3), "cannot be seen: the model is a single layer"),
    "no flattening": (lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.Linear(9, 3)), "0 stands in front of 1, where"),
    "flattened elsewhere": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(2), nn.Linear(63, 3)),
        r"0 gives \(2, 6, 7, 9\), 1 makes \(2, 6, 63\) of it, which is not \(N, C \* H \* W\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_cannot_be_replaced_say_why(name: str) -> None:
    factory, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"the model's fully connected head cannot be replaced: .*{message}"):
        pooled(factory())
