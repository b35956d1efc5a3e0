"""Handwritten digits that come with scikit-learn: 1,797 images of 8x8 in 17 grey levels; no download, no files.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (its test set).
"""

from __future__ import annotations

import torch

from compress.data.source import Arrays, Augment, Source, arrays_source, fingerprint, permutation, share

TEST_SPLIT_SEED = 0


def digits(val_fraction: float = 0.1, test_fraction: float = 0.25, seed: int = 0, limit: int | None = None) -> Source:
    """scikit-learn's digits, (1, 8, 8) with levels 0 to 16, split at random.

    Both fractions are of all images. The test images are the same for every `seed`, so that seeds can be compared
    and a model never meets its own training images under another seed; `seed` chooses which of the others are val.
    `limit` bounds each split.

    Raises:
        DataError: fractions or a limit that leave nothing.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    pixels, labels = load_digits(return_X_y=True)
    everything = Arrays(
        torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).to(torch.int64)
    )
    count = len(everything)
    order = permutation(count, TEST_SPLIT_SEED)
    test_images = share("test_fraction", test_fraction, count)
    contents = fingerprint(everything.pixels.numpy().tobytes(), everything.labels.numpy().tobytes(), test_images)
    return arrays_source(
        "digits",
        everything[order[test_images:]],
        everything[order[:test_images]],
        val_images=share("val_fraction", val_fraction, count),
        seed=seed,
        limit=limit,
        input={"order": "gray", "scale": 16.0, "mean": [0.305], "std": [0.376]},
        augment=Augment(pad=1, flip=False),
        contents=contents,
        class_names=tuple("0123456789"),
    )
