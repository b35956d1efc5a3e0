"""Order, augmentation and normalisation of batches, against plain loops and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.data import Arrays, Augment, Source, make_task
from compress.data.batches import parts, vary
from compress.data.input import complete, normalise
from compress.data.source import arrays_source, hold_out
from compress.errors import ConfigError, DataError

RGB = {"order": "rgb", "scale": 255.0, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def source(images: int = 30, channels: int = 3, augment: Augment | None = None, **changes: object) -> Source:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (images, channels, 6, 8), dtype=torch.uint8, generator=generator)
    # The first pixel tells which image it is.
    pixels[:, :, 0, 0] = torch.arange(images, dtype=torch.uint8)[:, None]
    data = Arrays(pixels, torch.arange(images) % 3)
    gray = {"order": "gray", "scale": 255.0, "mean": [0.5], "std": [0.2]}
    settings = {"val_images": 5, "seed": 0, "limit": None, "input": RGB if channels == 3 else gray, **changes}
    return arrays_source(
        "made",
        data,
        data,
        augment=augment or Augment(pad=0, flip=False),
        contents="made",
        class_names=("a", "b", "c"),
        **settings,  # type: ignore[arg-type]
    )


def which(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 0.2 + 0.5).mul(255).round().int().tolist()


def test_an_epoch_gives_every_training_image_once_and_in_another_order() -> None:
    task = make_task(source(), batch_size=8, calibration_images=10)
    seen = [which(x) for x, _ in task.train.epoch(1)]
    # 25 images in batches of 8 leave one over, which joins the batch before it.
    assert [len(part) for part in seen] == [8, 8, 9]
    assert len(task.train) == 3
    assert task.train.images == 25
    flat = [image for part in seen for image in part]
    assert sorted(flat) == sorted(i for x, _ in task.train for i in which(x))
    assert flat != sorted(flat)
    assert len(set(flat)) == 25


def test_labels_stay_with_their_images() -> None:
    task = make_task(source(augment=Augment(0, False)), batch_size=8)
    for x, y in task.train.epoch(5):
        assert [i % 3 for i in which(x)] == y.tolist()
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_the_same_seed_gives_the_same_batches_and_leaves_the_global_random_numbers_alone() -> None:
    task = make_task(source(augment=Augment(2, True)), batch_size=8)
    state = torch.random.get_rng_state()
    first, again, other = (list(task.train.epoch(seed)) for seed in (1, 1, 2**56 - 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_only_training_epochs_are_augmented() -> None:
    task = make_task(source(augment=Augment(2, True)), batch_size=8)
    for batches in (task.calibration, task.val, task.test):
        plain = {tuple(x.flatten().tolist()) for batch, _ in batches for x in batch}
        assert {tuple(x.flatten().tolist()) for batch, _ in batches.epoch(1) for x in batch} == plain


def test_varying_equals_padding_cutting_and_mirroring_image_by_image() -> None:
    pixels = torch.randint(0, 256, (40, 3, 6, 8), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 5, (40, 2)), torch.rand(40) < 0.5
    varied = vary(pixels, offsets, flips, pad=2)
    for i in range(40):
        y, x = offsets[i].tolist()
        wanted = np.pad(pixels[i].numpy(), ((0, 0), (2, 2), (2, 2)))[:, y : y + 6, x : x + 8]
        assert np.array_equal(varied[i].numpy(), wanted[:, :, ::-1] if flips[i] else wanted)


def test_varying_by_nothing_is_the_identity() -> None:
    pixels = torch.randint(0, 256, (4, 1, 5, 5), dtype=torch.uint8)
    assert torch.equal(vary(pixels, torch.full((4, 2), 3), torch.zeros(4, dtype=torch.bool), pad=3), pixels)


@pytest.mark.parametrize("order", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_plain_arithmetic(order: str, channels: int) -> None:
    pixels = torch.randint(0, 256, (4, channels, 5, 5), dtype=torch.uint8)
    kept = pixels.clone()
    width = 1 if order == "gray" else 3
    mean, std = [0.5, 0.25, 0.125][:width], [0.5, 0.25, 2.0][:width]
    described = complete({"scale": 2.0, "size": [5, 5]}, {"order": order, "mean": mean, "std": std})
    x = pixels.numpy().astype(np.float64)
    if order == "gray":
        x = x.mean(axis=1, keepdims=True)
    elif channels == 1:
        x = np.repeat(x, 3, axis=1)
    elif order == "bgr":
        x = x[:, ::-1]
    shape = (1, -1, 1, 1)
    wanted = (x / 2.0 - np.array(mean).reshape(shape)) / np.array(std).reshape(shape)
    assert np.allclose(normalise(pixels, described).numpy(), wanted, rtol=1e-6, atol=1e-4)
    assert torch.equal(pixels, kept)


def test_calibration_images_come_from_train_and_example_is_the_first_two() -> None:
    task = make_task(source(), batch_size=4, calibration_images=7)
    train = {i for x, _ in task.train for i in which(x)}
    chosen = [i for x, _ in task.calibration for i in which(x)]
    assert task.calibration.images == len(set(chosen)) == 7
    assert set(chosen) <= train
    assert which(task.example) == chosen[:2]
    assert task.example.shape == (2, 3, 6, 8)
    assert make_task(source(), calibration_images=1000).calibration.images == 25


def test_train_and_val_share_no_image_and_the_seed_decides() -> None:
    train, val = hold_out(100, 20, seed=3)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))
    assert len(val) == 20
    assert not torch.equal(val, hold_out(100, 20, seed=4)[1])
    assert torch.equal(val, hold_out(100, 20, seed=3)[1])


def test_the_fingerprint_follows_what_matters() -> None:
    def of(changes: dict[str, object] | None = None, **arguments: object) -> str:
        return make_task(source(**(changes or {})), **arguments).fingerprint  # type: ignore[arg-type]

    variants = [
        of(),
        of({"seed": 1}),
        of({"val_images": 6}),
        of({"limit": 10}),
        of({"augment": Augment(1, False)}),
        of(batch_size=64),
        of(calibration_images=10),
        of(input={"mean": [0.0, 0.0, 0.0]}),
    ]
    assert len(set(variants)) == len(variants)
    assert of() == of()


def test_limit_bounds_each_split() -> None:
    limited = source(limit=3)
    assert (len(limited.train), len(limited.val), len(limited.test)) == (3, 3, 3)


def test_parts_never_end_in_a_single_image() -> None:
    for count in range(2, 20):
        pieces = parts(torch.arange(count), 3)
        assert torch.equal(torch.cat(pieces), torch.arange(count))
        assert all(len(piece) > 1 for piece in pieces)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` (=0) must be at least 2"),
        ({"calibration_images": 1}, "`calibration_images` (=1) must be at least 2"),
        ({"precision": "int8"}, "`precision` (='int8') must be one of float32, bfloat16."),
        ({"input": {"means": [0.0]}}, "`input` has the unknown key 'means'"),
        ({"input": {"order": "hsv"}}, "`input.order` (='hsv') must be one of rgb, bgr, gray."),
        ({"input": {"order": "gray"}}, "`input.mean` (=[0.5, 0.4, 0.3]) must hold 1 number(s)"),
        ({"input": {"mean": 0.5}}, "`input.mean` (=0.5) must be a list of numbers"),
        ({"input": {"std": [1, 0, 1]}}, "`input.std` (=[1, 0, 1]) must be above 0"),
        ({"input": {"scale": 0}}, "`input.scale` (=0) must be a number above 0"),
        ({"input": {"size": [6]}}, "`input.size` (=[6]) must be [height, width]"),
        ({"input": {"resize": 7}}, "`input.resize` (=7) must be the length of the shorter side"),
        ({"input": {"crop": "left"}}, "`input.crop` (='left') must be 'center' or null."),
        ({"input": {"size": [7, 8]}}, "these images are 6x8 and are used as they are"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_task(source(), **arguments)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        make_task(source(limit=1), batch_size=1, calibration_images=0)
    assert len(str(raised.value).splitlines()) == 3
    assert "made has 1 training image(s); at least 2 are needed" in str(raised.value)


@pytest.mark.parametrize("val_images", [0, 30, 31])
def test_val_must_leave_something_to_train_on(val_images: int) -> None:
    with pytest.raises(DataError) as raised:
        source(val_images=val_images)
    assert f"`val_images` (={val_images}) must be at least 1 and less than the 30 training images" in str(raised.value)


def test_a_limit_of_nothing() -> None:
    with pytest.raises(DataError) as raised:
        source(limit=0)
    assert "`limit` (=0) must be at least 1" in str(raised.value)
