"""Int8 without training beside other tools' of the same float network: `peers.py [NETWORK ...]`.

onnxruntime's own static quantization and NNCF's (where it is installed), each with its defaults for convolutional
networks, weights per channel, and the same 1,000 calibration images; ours is `Quantize` alone, as in recipe `int8`, and
beside it the same with `CorrectBias`. Top-1 is that of the ONNX files in onnxruntime, with ours' paired difference to
each; how far a file is from the float network is told by the divergence of its answers. Over the same images it is
counted how often ours in torch gives the answer of its own file. Times are ratios of ours to theirs, measured in turns,
onnxruntime's in onnxruntime and NNCF's in OpenVINO. Do it when nothing else runs.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import RESULTS, data_root, record
from imagenette import imagenette
from torch import Tensor, nn

from compress.data import cifar10, make_task
from compress.lower import export_onnx
from compress.measure import accuracy, latency, paired
from compress.models import mobilenet_v1, resnet20, resnet56
from compress.models.weights import load_weights
from compress.stages import CorrectBias, Quantize
from compress.task import Task, Work
from compress.train import divergence, logits

CIFAR = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGES = 1000  # that ranges are calibrated on
BATCHES = (1, 32)
Row = dict[str, Any]


def cifar(factory: Callable[[], nn.Module], file: str) -> tuple[nn.Module, Task]:
    task = make_task(cifar10(data_root()), input=CIFAR, calibration_images=IMAGES)
    return loaded(factory(), file), task


def mobilenet() -> tuple[nn.Module, Task]:
    task = make_task(
        imagenette(), input={"mean": [0.5] * 3, "std": [0.5] * 3}, batch_size=32, calibration_images=IMAGES
    )
    return loaded(mobilenet_v1(classes=1000, width=0.75), "mobilenet_v1_0.75_224.pt"), task


def loaded(model: nn.Module, file: str) -> nn.Module:
    load_weights(model, data_root() / "weights" / file)
    return model.eval()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Task]]] = {
    "resnet20": lambda: cifar(resnet20, "resnet20-12fca82f.th"),
    "resnet56": lambda: cifar(resnet56, "resnet56-4bfd9763.th"),
    "mobilenet_v1": mobilenet,
}


def batches(task: Task) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for images, _ in task.calibration:
        yield {"input": images.numpy()}


def by_onnxruntime(source: Path, path: Path, task: Task) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.left = batches(task)

        def get_next(self) -> Any:
            return next(self.left, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    return path


def by_nncf(source: Path, path: Path, task: Task) -> Path:
    import nncf
    import onnx

    data = nncf.Dataset(list(batches(task)))
    quantized = nncf.quantize(onnx.load(source), data, subset_size=len(task.calibration))
    onnx.save(quantized, path)
    return path


def answers(path: Path, task: Task) -> Tensor:
    """The file's logits for the test images: (images, classes)."""
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [
        torch.from_numpy(session.run(None, {"input": part.numpy()})[0])
        for images, _ in task.test
        for part in images.split(100)
    ]
    return torch.cat(outputs)


def compared(network: str, folder: Path) -> Row:
    model, task = NETWORKS[network]()
    example: Tensor = next(iter(task.calibration))[0][:8]
    files = {"float": folder / "float.onnx", "ours": folder / "ours.onnx"}
    export_onnx(model, example, files["float"], input=task.input)
    ours = Quantize(calibration_images=IMAGES)(copy.deepcopy(model), task, Work(folder)).model
    export_onnx(ours, example, files["ours"], input=task.input)
    in_torch, labels = logits(ours, task.test, torch.device("cpu"))
    files["ours, corrected"] = folder / "corrected.onnx"
    export_onnx(CorrectBias()(ours, task, Work(folder)).model, example, files["ours, corrected"], input=task.input)
    files["onnxruntime"] = by_onnxruntime(files["float"], folder / "onnxruntime.onnx", task)
    peers = {"onnxruntime": "onnxruntime"}
    if find_spec("nncf") is not None:
        files["nncf"] = by_nncf(files["float"], folder / "nncf.onnx", task)
        peers["nncf"] = "openvino"
    row: Row = {"network": network, "bytes": {name: path.stat().st_size for name, path in files.items()}}
    named = {name: answers(path, task) for name, path in files.items()}
    right = {name: each.argmax(1) == labels for name, each in named.items()}
    row["accuracy"] = {name: accuracy(int(each.sum()), len(labels)) for name, each in right.items()}
    row["ours_against"] = {name: paired(each, right["ours"]) for name, each in right.items() if name != "ours"}
    row["divergence"] = {name: divergence(each, named["float"]) for name, each in named.items()}
    row["torch_agrees_percent"] = 100 * float((in_torch.argmax(1) == named["ours"].argmax(1)).float().mean())
    row["latency"] = {
        f"{peer}, batch {batch}": {
            name: asdict(each)
            for name, each in latency(
                {peer: files[peer], "ours": files["ours"], "float": files["float"]}, example, target=target, batch=batch
            ).items()
        }
        for peer, target in peers.items()
        for batch in BATCHES
    }
    return row


def main() -> None:
    file = RESULTS / "peers.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for network in sys.argv[1:] or NETWORKS:
        if network not in NETWORKS:
            sys.exit(f"{network} is not one of {', '.join(NETWORKS)}")
        with tempfile.TemporaryDirectory() as folder:
            row = compared(network, Path(folder))
        rows = [*(old for old in rows if old["network"] != network), row]
        record("peers", rows, calibration_images=IMAGES, data="CIFAR-10 test; imagenette-mini val among 1000 classes")


if __name__ == "__main__":
    main()
