"""Where images come from, one file per source, and how they become the batches of a `Task`.

A source is made by a factory whose arguments are plain values, so that a YAML file can name it:
`make_task(cifar10("data"), batch_size=128)`.
"""

from compress.data.batches import make_task
from compress.data.cifar import cifar10
from compress.data.digits import digits
from compress.data.folder import folder
from compress.data.idx import fashion_mnist, mnist
from compress.data.input import normalise
from compress.data.source import Arrays, Augment, Images, Source

__all__ = [
    "Arrays",
    "Augment",
    "Images",
    "Source",
    "cifar10",
    "digits",
    "fashion_mnist",
    "folder",
    "make_task",
    "mnist",
    "normalise",
]
