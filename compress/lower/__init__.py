"""From a trained model to what a runtime executes: plain torch layers, an ONNX file, a `torch.export` file."""

from compress.lower.file import EXPORTS, SUFFIXES, write_file
from compress.lower.fold import fold_batch_norm
from compress.lower.onnx_file import export_onnx
from compress.lower.plain import lower
from compress.lower.pt2 import export_pt2
from compress.lower.pt2_x86 import export_pt2_x86

__all__ = [
    "EXPORTS",
    "SUFFIXES",
    "export_onnx",
    "export_pt2",
    "export_pt2_x86",
    "fold_batch_norm",
    "lower",
    "write_file",
]
