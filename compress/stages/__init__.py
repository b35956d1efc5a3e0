"""The stages, one file each; a recipe names them as `compress.stages.NAME`."""

from compress.stages.ada_round import AdaRound
from compress.stages.cluster import Cluster
from compress.stages.convert_shift import ConvertShift
from compress.stages.correct_bias import CorrectBias
from compress.stages.equalize import Equalize
from compress.stages.factorize import Factorize
from compress.stages.finetune import FineTune
from compress.stages.fire import Fire
from compress.stages.fold_batch_norm import FoldBatchNorm
from compress.stages.freeze_ranges import FreezeRanges
from compress.stages.freeze_shifts import FreezeShifts
from compress.stages.group import Group
from compress.stages.invert import Invert
from compress.stages.mixed_precision import MixedPrecision
from compress.stages.pool_head import PoolHead
from compress.stages.prune import Prune
from compress.stages.prune_channels import PruneChannels
from compress.stages.prune_shifts import PruneShifts
from compress.stages.quantize import Quantize
from compress.stages.quantize_dynamic import QuantizeDynamic
from compress.stages.reestimate_batch_norm import ReestimateBatchNorm
from compress.stages.separable import Separable
from compress.stages.shift import Shift
from compress.stages.sparsify_channels import SparsifyChannels
from compress.stages.squeeze_excite import SqueezeExcite

__all__ = [
    "AdaRound",
    "Cluster",
    "ConvertShift",
    "CorrectBias",
    "Equalize",
    "Factorize",
    "FineTune",
    "Fire",
    "FoldBatchNorm",
    "FreezeRanges",
    "FreezeShifts",
    "Group",
    "Invert",
    "MixedPrecision",
    "PoolHead",
    "Prune",
    "PruneChannels",
    "PruneShifts",
    "Quantize",
    "QuantizeDynamic",
    "ReestimateBatchNorm",
    "Separable",
    "Shift",
    "SparsifyChannels",
    "SqueezeExcite",
]
