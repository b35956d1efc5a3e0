"""The stages, one file each; a recipe names them as `compress.stages.NAME`."""

from compress.stages.finetune import FineTune
from compress.stages.quantize import Quantize
from compress.stages.shift import Shift

__all__ = ["FineTune", "Quantize", "Shift"]
