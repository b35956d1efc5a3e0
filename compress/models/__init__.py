"""Base models, one file per family. Each is a factory whose arguments are plain values, so that a file can name it."""

from compress.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56, resnet110, small

__all__ = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "small"]
