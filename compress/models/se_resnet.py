"""CIFAR residual networks with squeeze-and-excitation at the end of each residual branch.

Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018: the networks of `cifar_resnet.py`, gates in front of each
addition, with the paper's plain sigmoid. The bottleneck of a gate has `channels / reduction` units, and at least 4: the
paper's rule would leave the 16 channels of the first blocks one number to describe them all.
"""

from __future__ import annotations

from compress.models.cifar_resnet import CifarResNet


def se_resnet20(classes: int = 10, channels: int = 3, shortcut: str = "pad", reduction: int = 16) -> CifarResNet:
    """SE-ResNet-20 for 32x32 images: 272,782 parameters, 3,060 of them in the gates."""
    return CifarResNet(20, classes, channels, shortcut, width=16, reduction=reduction)


def se_resnet32(classes: int = 10, channels: int = 3, shortcut: str = "pad", reduction: int = 16) -> CifarResNet:
    """SE-ResNet-32 for 32x32 images: 469,254 parameters, 5,100 of them in the gates."""
    return CifarResNet(32, classes, channels, shortcut, width=16, reduction=reduction)


def se_resnet56(classes: int = 10, channels: int = 3, shortcut: str = "pad", reduction: int = 16) -> CifarResNet:
    """SE-ResNet-56 for 32x32 images: 862,198 parameters, 9,180 of them in the gates."""
    return CifarResNet(56, classes, channels, shortcut, width=16, reduction=reduction)
