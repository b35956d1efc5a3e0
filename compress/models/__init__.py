"""Base models, one file per family. Each is a factory whose arguments are plain values, so that a file can name it."""

from compress.models.alexnet import alexnet
from compress.models.as_resnet import as_net, as_resnet_w32, as_resnet_w50, as_resnet_w68
from compress.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56, resnet110, small
from compress.models.fe_net import fe_net
from compress.models.mobilenet import mobilenet_v1, mobilenet_v2
from compress.models.se_resnet import se_resnet20, se_resnet32, se_resnet56
from compress.models.shift_resnet import shift_resnet20, shift_resnet56, shift_resnet110
from compress.models.shiftnet import shiftnet_a, shiftnet_b, shiftnet_c
from compress.models.squeezenet import squeezenet1_0, squeezenet1_1

__all__ = [
    "alexnet",
    "as_net",
    "as_resnet_w32",
    "as_resnet_w50",
    "as_resnet_w68",
    "fe_net",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "se_resnet20",
    "se_resnet32",
    "se_resnet56",
    "shift_resnet20",
    "shift_resnet56",
    "shift_resnet110",
    "shiftnet_a",
    "shiftnet_b",
    "shiftnet_c",
    "small",
    "squeezenet1_0",
    "squeezenet1_1",
]
