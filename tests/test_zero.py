"""What traces and files make of the zeros that stand for a residual branch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from thin_nets import Around
from torch import Tensor, fx, nn

from compress.lower import export_onnx, export_pt2
from compress.nn.places import trace
from compress.nn.zero import Zero

SHAPE = (2, 8, 8)


def test_a_trace_has_no_addition_of_zero() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = (net.zero(net.conv1(x) * net.conv1(x).sigmoid()) + x).relu()
        return y + x  # type: ignore[no-any-return]

    model = Around(forward, zero=Zero()).eval()
    graph, x = trace(model), torch.randn(2, *SHAPE)
    assert [node.name for node in graph.nodes] == ["x", "stem", "relu", "relu_1", "add_1", "mean", "last", "output"]
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
    changing = Around(lambda net, x: torch.relu_(net.zero(net.conv1(x)) + x) + x, zero=Zero()).eval()
    with pytest.raises(ValueError, match="changes a tensor in place that is read again later"):
        trace(changing)


class Filled(nn.Module):
    """Zeros of its own, which it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.zero, self.relu = nn.Conv2d(2, 2, 1), Zero(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        own = x.new_zeros(x.shape)
        own.narrow(1, 0, 1).copy_(x.narrow(1, 0, 1))
        y = self.conv(x + own)
        y = y + self.relu(self.zero(x) + y)
        return (self.zero(x) + y.relu()).relu()  # type: ignore[no-any-return]


def test_files_leave_out_only_what_a_zero_adds(tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(0)
    for result in (
        export_pt2(Filled().eval(), torch.randn(2, 2, 4, 4), tmp_path / "model.pt2"),
        export_onnx(Filled().eval(), torch.randn(2, 2, 4, 4), tmp_path / "model.onnx", input={}),
    ):
        assert all(row["max_abs"] < 1e-6 for row in result["parity"])
