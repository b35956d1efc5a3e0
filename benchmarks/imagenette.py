"""imagenette-mini for networks of 1000 classes: ten of ImageNet's, 100 training and 50 validation images of each."""

from __future__ import annotations

from typing import Any

from common import data_root

from compress.data import Source, folder

CLASSES = dict(n01440764=0, n02102040=217, n02979186=482, n03000684=491, n03028079=497)
CLASSES |= dict(n03394916=566, n03417042=569, n03425413=571, n03445777=574, n03888257=701)


def imagenette(**settings: Any) -> Source:
    """The images at 224 pixels, labelled among the 1000 classes; `settings` as in `compress.data.folder`."""
    given = {"size": 224, "resize": 224, "classes": 1000, "class_index": CLASSES} | settings
    return folder(data_root() / "imagenette-mini", **given)
