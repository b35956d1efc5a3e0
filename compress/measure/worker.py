"""Runs one model file in one runtime and times it when told to: the process `compress.measure.timing` starts.

A script, never imported with the package: nothing but one runtime may live in this process, since thread pools of two
spoil each other. It gets its settings as JSON in the first argument, answers one JSON line when the model is loaded,
then one for each line read: {"seconds": s, "least": n} runs the model for that long and gives {"ms": [...]}.
"""

from __future__ import annotations

import os
import sys

# A script's folder leads the search path, where our modules would be found in place of the standard library's.
sys.path[:] = [
    entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(os.path.abspath(__file__))
]

import gc  # noqa: E402 - after the search path is put right
import json  # noqa: E402 - likewise
import time  # noqa: E402 - likewise
from collections.abc import Callable  # noqa: E402 - likewise
from importlib.metadata import version  # noqa: E402 - likewise
from typing import Any  # noqa: E402 - likewise

Settings = dict[str, Any]
Loaded = tuple[Callable[[], object], str, str]  # one inference; the runtime with its version; the precision it uses


def load_onnxruntime(settings: Settings) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    # Threads that spin while they wait cost a neighbour's whole time slice on a machine that is not idle: the median
    # hardly moves, but single calls take ten times as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(settings["path"], options, providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    feed = {wanted.name: images(settings["shape"], wanted.type)}
    return lambda: session.run(None, feed), f"onnxruntime {onnxruntime.__version__}", "as in the file"


def load_openvino(settings: Settings) -> Loaded:
    import openvino

    core = openvino.Core()
    model = core.read_model(settings["path"])
    model.reshape(settings["shape"])
    config = {"INFERENCE_NUM_THREADS": settings["threads"], "PERFORMANCE_HINT": "LATENCY"}
    if settings["precision"]:
        config["INFERENCE_PRECISION_HINT"] = settings["precision"]
    compiled = core.compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    feed = [images(settings["shape"], str(model.input(0).element_type))]
    version = openvino.__version__.split("-")[0]
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    name = precision.to_string() if hasattr(precision, "to_string") else str(precision)
    return lambda: request.infer(feed), f"openvino {version}", name


def load_torch(settings: Settings) -> Loaded:
    import torch
    import torch.ao.quantization.fx  # registers the operators of a model.x86.pt2

    target = settings["target"]
    torch.set_num_threads(settings["threads"])
    if settings["path"].endswith(".safetensors"):
        return load_checkpoint(settings)
    program = torch.export.load(settings["path"])
    batch = torch.from_numpy(images(settings["shape"], "float"))
    if target == "cuda":
        from torch.export.passes import move_to_device_pass

        program, batch = move_to_device_pass(program, "cuda"), batch.cuda()
    run: Callable[[Any], object] = program.module()
    name = f"{target} {torch.__version__}"
    if target == "torch.compile":
        import torch._inductor.config as inductor

        inductor.freezing = True
        run, name = torch.compile(run), name + ", weights frozen"

    def infer() -> object:
        with torch.no_grad():
            out = run(batch)
            if target == "cuda":
                torch.cuda.synchronize()
        return out

    return infer, name, "as in the file"


def load_checkpoint(settings: Settings) -> Loaded:
    """The one file that takes the package to load: layers that torchao has kernels for run in those."""
    sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "../..")))  # a checkout is not installed
    import torch

    import compress
    from compress.lower.torchao import is_dynamic, to_torchao

    target = settings["target"]
    device = "cuda" if target == "cuda" else "cpu"
    model = compress.load(settings["path"], allow=settings["allow"]).to(device)
    name = f"{target} {torch.__version__}"
    if is_dynamic(model):
        model, name = to_torchao(model), f"{name}, torchao {version('torchao')}"
    batch = torch.from_numpy(images(settings["shape"], "float")).to(device)

    def infer() -> object:
        with torch.no_grad():
            out = model(batch)
            if target == "cuda":
                torch.cuda.synchronize()
        return out

    return infer, name, "as in the file"


def images(shape: list[int], kind: str) -> Any:
    """Noise like normalised images, or bytes where the file wants those; the same in every process."""
    import numpy

    random = numpy.random.default_rng(0)
    if "uint8" in kind or "u8" in kind:
        return random.integers(0, 256, shape, dtype=numpy.uint8)
    return random.standard_normal(shape, dtype=numpy.float32)


def timed(infer: Callable[[], object], seconds: float, least: int) -> list[float]:
    """Milliseconds of each call: for `seconds`, at least `least` calls, after two that wake caches and threads."""
    infer()
    infer()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        infer()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    # Runtimes print; what they print goes to stderr, and the answers keep a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    loaders = {"onnxruntime": load_onnxruntime, "openvino": load_openvino}
    infer, runtime, precision = loaders.get(settings["target"], load_torch)(settings)
    infer()
    gc.collect()
    gc.disable()
    answer: dict[str, Any] = {"runtime": runtime, "precision": precision}
    while True:
        print(json.dumps(answer), file=channel, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        turn = json.loads(line)
        answer = {"ms": timed(infer, turn["seconds"], turn["least"])}


if __name__ == "__main__":
    main()
