"""The size of Song Han's deep-compressed SqueezeNet as one file of ours, which must come back bit by bit."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import data_root, record

from compress import checkpoint, models
from compress.sealed import unseal

WEIGHTS = "squeezenet_v1.0-deep-compressed.pt"
HIS_BYTES = 675_763  # compressed_SqueezeNet.net: codes of 8 bits, gaps of 4 bits, no Huffman coding
BUILD = ("compress.models.squeezenet1_0", {"padding": 1})
INPUT: dict[str, Any] = {"order": "bgr", "scale": 255, "size": [227, 227]}
INPUT |= {"mean": [104 / 255, 117 / 255, 123 / 255], "std": [1 / 255, 1 / 255, 1 / 255]}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


state = torch.load(data_root() / "weights" / WEIGHTS, weights_only=True)
model = models.squeezenet1_0(padding=1)
model.load_state_dict(state)
weights = [tensor for tensor in state.values() if tensor.dim() > 1]
with tempfile.TemporaryDirectory() as folder:
    sizes = {}
    for form in ("training", "packed"):
        file = Path(folder) / f"{form}.safetensors"
        about: dict[str, Any] = {"input": INPUT, "provenance": {}, "results": {}}
        sizes[form] = checkpoint.save(model, file, build=BUILD, form=form, **about)
    data = file.read_bytes()
    again = checkpoint.load(file).state_dict()
equal = again.keys() == state.keys() and all(same_bits(again[name], state[name]) for name in state)
content, tensors = unseal(data)
stored = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
row = {
    "weights": sum(tensor.numel() for tensor in weights),
    "nonzero": sum(int(tensor.count_nonzero()) for tensor in weights),
    "his_bytes": HIS_BYTES,
    "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    "unpacked_bytes": sizes["training"],
    "bytes": sizes["packed"],
    "weight_bytes": sum(size for name, size in stored.items() if not name.startswith("/")),
    "bias_bytes": sum(size for name, size in stored.items() if name.startswith("/")),
    "other_bytes": sizes["packed"] - sum(stored.values()),
    "bit_equal": equal,
}
record("squeezenet_file", [row], model="SqueezeNet 1.0, Deep Compression (its author's file)", weights=WEIGHTS)
if not equal:
    sys.exit("the file does not come back bit by bit")
