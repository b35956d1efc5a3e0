"""From a trained model to what a runtime executes: plain torch layers, an ONNX file, a `torch.export` file."""

from compress.lower.fold import fold_batch_norm
from compress.lower.onnx_file import export_onnx
from compress.lower.plain import lower
from compress.lower.pt2 import export_pt2
from compress.lower.pt2_x86 import export_pt2_x86

EXPORTS = {"onnx": ".onnx", "pt2": ".pt2", "pt2_x86": ".x86.pt2"}  # what a run can write -> how the file ends

__all__ = ["EXPORTS", "export_onnx", "export_pt2", "export_pt2_x86", "fold_batch_norm", "lower"]
