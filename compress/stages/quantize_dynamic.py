"""QuantizeDynamic: matrix products in int8 or float8 for GPUs, whose inputs find their own scale each time.

What it does. Batch norm is folded into the convolutions. `Linear` layers and 1x1 convolutions become matrix products
with int8 weights, one scale for each output, on inputs that are rounded to int8 with one scale for each row (image or
pixel); or with float8 (e4m3) weights and inputs, one scale for each tensor. Nothing is calibrated. The arithmetic is
that of torchao's `quantize_`; `compress.lower.torchao.to_torchao` puts a loaded model into torchao's kernels. What
torchao would pass over without a word is a site with its reason. Fine-tuning afterwards is quantization-aware training.

When to use it, and when not. For GPUs, and networks that spend their time in 1x1 convolutions and linear layers:
MobileNets, ShiftNets, wide heads. 3x3 convolutions stay in float: a ResNet-20 has nothing to change. On a CPU use
`Quantize`: only it gives a file integer kernels there. float8 needs compute capability 8.9 (Ada, Hopper) or later, and
an image's answer then depends on the batch around it, since the batch shares a scale. An exported ONNX or `pt2` file
computes in float on the same grids, without ONNX's DynamicQuantizeLinear: int8 weights are int8 there, float8 weights
take 32 bits. torchao multiplies int8 in float where a product has 16 rows or fewer: a linear layer at a small batch.

Knobs. `dtype`: int8, whose products must have inputs and outputs that are multiples of 8, or float8, multiples of 16.
`include`, `exclude`: layers by name pattern.

Measured. Not yet measured.

Reference. Dettmers et al., "LLM.int8()", NeurIPS 2022; Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv:2209.05433; torchao, https://github.com/pytorch/ao.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.lower.fold import fold_batch_norm
from compress.lower.plain import weight_parts
from compress.nn.dynamic import DTYPES, DynamicLinear, DynamicPointwise, Float8Weight
from compress.quantization import KINDS, WeightGrid, is_quantized
from compress.stage import Edit, Keep
from compress.surgery import is_ours, kind, leaves, swap, weighted
from compress.task import Task, Work

# What inputs and outputs of a product must be multiples of: the kernels of GPUs take no others.
MULTIPLES = {"int8": 8, "float8": 16}
_OTHERWISE = {
    "int8": "torchao would take the rest to the CPU and back",
    "float8": "torchao would leave the rest in float without a word",
}
_CONVOLUTION = {
    "int8": "torchao's quantize_ has no int8 convolution",
    "float8": "torchao's float8 convolutions run on GPUs of compute capability 10 alone, with another package",
}


@dataclass(frozen=True)
class QuantizeDynamic:
    """Settings of the stage; see the module's card."""

    dtype: str = "int8"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = KINDS
    runs_in: ClassVar[str] = "torchao"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"`dtype` (={self.dtype!r}) must be one of {', '.join(DTYPES)}.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        if is_quantized(model):
            raise ConfigError("the model is quantized already; keep one of the stages that quantize.")
        was_training = model.training
        folded = fold_batch_norm(model.eval())
        ours = {kind(layer) for _, layer in leaves(model) if is_ours(layer)}
        model, sites = swap(model, self._product, (*self.kinds, *ours), self.include, self.exclude)
        return Edit(model.train(was_training), sites, {"dtype": self.dtype, "batch_norms_folded": len(folded)})

    def _product(self, name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            if not weighted(layer):
                raise Keep("it only displaces its input: there are no weights to quantize")
            raise Keep("torchao's quantize_ knows no layer of this kind: use `Quantize`")
        if isinstance(layer, nn.Conv2d):
            self._require_pointwise(layer)
        outputs, inputs = layer.weight.shape[:2]
        multiple = MULTIPLES[self.dtype]
        if inputs % multiple or outputs % multiple:
            raise Keep(
                f"it has {inputs} inputs and {outputs} outputs, and {self.dtype} kernels take multiples of {multiple} "
                f"only: {_OTHERWISE[self.dtype]}"
            )
        if not bool(layer.weight.any()):
            raise Keep("its weights are all zero, so that it gives nothing to find a range from; train it first")
        bias = layer.bias is not None
        new: DynamicLinear | DynamicPointwise
        if isinstance(layer, nn.Conv2d):
            new = DynamicPointwise(inputs, outputs, (layer.stride[0], layer.stride[1]), bias, self.dtype)
            _take(new.linear, layer)
        else:
            new = DynamicLinear(inputs, outputs, bias, self.dtype)
            new.linear = layer
        self._put_on_grid(new.linear)
        return new

    def _require_pointwise(self, layer: nn.Conv2d) -> None:
        """Raise `Keep` unless the convolution is a plain matrix product."""
        if layer.kernel_size != (1, 1):
            raise Keep(f"{_CONVOLUTION[self.dtype]}: use `Quantize`, or substitute the layer")
        if layer.groups != 1:
            raise Keep(
                f"its {layer.groups} groups are as many products, and torchao's quantize_ makes one: use `Quantize`"
            )
        if layer.padding not in ((0, 0), "valid", "same"):
            raise Keep(
                f"its padding {layer.padding} adds pixels to a product that torchao's quantize_ makes of what is there"
            )
        foreign = [type(p) for p in weight_parts(layer) if not type(p).__module__.startswith("compress.nn.")]
        if foreign:
            raise Keep(f"its weights are computed by {foreign[0].__name__}, which was made for a convolution's shape")

    def _put_on_grid(self, linear: nn.Linear) -> None:
        if self.dtype == "int8":
            grid: nn.Module = WeightGrid().of(linear.weight, 8)
        else:
            grid = Float8Weight().to(linear.weight.device)
            grid.follow(linear.weight)
        parametrize.register_parametrization(linear, "weight", grid)


def _take(linear: nn.Linear, layer: nn.Conv2d) -> None:
    """Give the linear layer the weights of a 1x1 convolution, with the mask and the table that compute them."""
    linear.to(device=layer.weight.device, dtype=layer.weight.dtype)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    chain, shape = weight_parts(layer), layer.weight.shape
    for part in chain:
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.shape == shape:
                setattr(part, name, buffer.flatten(1).clone())
        parametrize.register_parametrization(linear, "weight", part)
    both: tuple[Any, Any] = (layer, linear)
    old, new = (module.parametrizations.weight if chain else module for module in both)
    held = "original" if chain else "weight"
    latent = getattr(old, held)
    setattr(new, held, nn.Parameter(latent.detach().flatten(1).clone(), requires_grad=latent.requires_grad))
