"""What a figure was measured with: versions of libraries, and the machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.measure import available_threads

LIBRARIES = ("torch", "torchao", "torch-pruning", "tensorly", "onnx", "onnxruntime", "openvino", "nncf")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_int8")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that figures depend on or stand beside, where installed."""
    found = {"compress": __version__, "python": platform.python_version()}
    for package in LIBRARIES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, and the GPU where there is one."""
    cpu: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in cpu.get("flags", "").split()],
        "cores": available_threads(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.system(),
    }
