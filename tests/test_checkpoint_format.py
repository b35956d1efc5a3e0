"""The file format: what was written once still loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from compress import checkpoint
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.surgery import kind


def test_files_of_the_first_format_still_load() -> None:
    """The file was written once, by the first version of format 1, and is never written anew."""
    folder = Path(__file__).parent / "golden"
    model = checkpoint.load(folder / "format1.safetensors")
    truth = json.loads((folder / "format1-truth.json").read_text())
    assert checkpoint.read(folder / "format1.safetensors")["provenance"] == {"seed": 0}
    kinds = {kind(module) for module in model.modules()}
    assert {ShiftConv2d, FakeQuantize, FakeQuantizeWeight, nn.Sequential, nn.Identity} <= kinds
    for name, tensor in model.state_dict().items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(data).hexdigest()[:16] == truth["state"].pop(name), name
    assert truth["state"] == {}
    with torch.no_grad():
        logits = model((torch.arange(256) * 7919 % 1000 / 500 - 1).view(4, 1, 8, 8))
    expected = torch.tensor(truth["logits"])
    # Another version of torch may round differently, and a quantizer makes a whole step of it.
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
