"""From a trained model to what a runtime executes: plain torch layers, an ONNX file, a `torch.export` file."""

from compress.lower.fold import fold_batch_norm
from compress.lower.onnx_file import export_onnx
from compress.lower.plain import lower
from compress.lower.pt2 import export_pt2

__all__ = ["export_onnx", "export_pt2", "fold_batch_norm", "lower"]
