"""Folders of image files: decoding, classes, worker processes, broken files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import folder, make_task
from compress.errors import DataError


def error(function: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(DataError) as raised:
        function(*args, **kwargs)  # type: ignore[operator]
    return str(raised.value)


@pytest.fixture
def made_folder(tmp_path: Path) -> Path:
    """Two classes, `left` and `right`: 5 training and 2 val images each, of several forms; 20 high, 40 wide."""
    for split, count in (("train", 5), ("val", 2)):
        for name in ("left", "right"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((20, 40, 3), np.uint8)
                pixels[:, : 20 if name == "left" else 40, 0] = 200
                pixels[:, 20 if name == "left" else 0 :, 2] = 100
                image = Image.fromarray(pixels)
                if i == 1:
                    image = image.convert("L")
                image.save(place / f"{i}.{'png' if i < 3 else 'JPEG'}", quality=95)
            (place / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_resized_and_cut_in_the_middle(made_folder: Path, workers: int) -> None:
    source = folder(made_folder, size=8, resize=10, workers=workers, val_fraction=0.2)
    assert (len(source.train), len(source.val), len(source.test)) == (8, 2, 4)
    pixels, labels = next(source.test.batches([torch.tensor([0, 2, 3, 1])]))
    assert (pixels.shape, pixels.dtype, labels.tolist()) == ((4, 3, 8, 8), torch.uint8, [0, 1, 1, 0])
    left = pixels[0]
    assert left[0, :, :3].unique().tolist() == [200] and left[2, :, 5:].unique().tolist() == [100]
    assert left[0, :, 5:].max() == 0 and left[1].max() == 0
    assert torch.equal(pixels[3][0], pixels[3][1])  # a grey file: equal channels
    assert make_task(source, batch_size=4).example.shape == (2, 3, 8, 8)


def test_an_image_of_the_right_size_is_not_touched(made_folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made_folder / "val" / "left" / "0.png")
    source = folder(made_folder, size=9, resize=9, workers=0)
    found, _ = next(source.test.batches([torch.tensor([0])]))
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), pixels)


def test_the_network_may_want_another_size(made_folder: Path) -> None:
    task = make_task(folder(made_folder, size=8, workers=0), batch_size=4, input={"size": [6, 7], "resize": 12})
    assert next(iter(task.val))[0].shape[1:] == (3, 6, 7)
    assert task.input["resize"] == 12


def test_worker_processes_leave_order_and_random_numbers_alone(made_folder: Path) -> None:
    one, two = (make_task(folder(made_folder, size=8, workers=w), batch_size=3) for w in (0, 2))
    state = torch.random.get_rng_state()
    for (a, b), (c, d) in zip(one.train.epoch(3), two.train.epoch(3), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert torch.equal(state, torch.random.get_rng_state())


def test_classes_of_a_larger_network(made_folder: Path) -> None:
    source = folder(made_folder, size=8, workers=0, classes=1000, class_index={"left": 701, "right": 3})
    assert source.classes == 1000
    assert source.test.labels.tolist() == [701, 701, 3, 3]
    assert "`class_index` has no number for the folder 'right'" in error(
        folder, made_folder, class_index={"left": 1}, classes=9
    )
    assert "`class_index` needs `classes` beside it" in error(folder, made_folder, class_index={"left": 1, "right": 0})
    assert "'left' has 7" in error(folder, made_folder, classes=7, class_index={"left": 7, "right": 0})
    assert "`classes` (=1) must be more than the number of every class" in error(folder, made_folder, classes=1)


def test_the_folder_fingerprint_follows_its_files(made_folder: Path) -> None:
    before = folder(made_folder, size=8).fingerprint
    assert folder(made_folder, size=8).fingerprint == before
    os.utime(made_folder / "train" / "left" / "0.png", ns=(1, 1))
    assert folder(made_folder, size=8).fingerprint != before


def test_an_image_that_cannot_be_decoded_is_named(made_folder: Path) -> None:
    path = made_folder / "train" / "right" / "3.JPEG"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        path.write_bytes(broken)
        text = error(folder, made_folder, size=8)
        assert text.startswith(f"{path} cannot be decoded (") and text.endswith("remove or replace the file.")
    path.write_bytes(whole)
    source = folder(made_folder, size=8, workers=1)
    path.write_bytes(whole[: len(whole) // 2])  # broken after it was looked at: named all the same
    with pytest.raises(DataError) as raised:
        list(make_task(source, batch_size=4, calibration_images=2).train.epoch(0))
    assert str(raised.value).startswith(f"{path} cannot be decoded (")


def test_sixteen_bit_images_are_refused(made_folder: Path) -> None:
    path = made_folder / "val" / "left" / "0.png"
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(path)
    source = folder(made_folder, size=8, workers=0)
    with pytest.raises(DataError, match=r"0\.png has more than 8 bits a channel"):
        list(make_task(source, batch_size=4).test)


def test_folders_that_make_no_sense(tmp_path: Path) -> None:
    assert "`root` (=None) is not a folder" in error(folder, None)
    assert f"`root` (='{tmp_path / 'typo'}') is not a folder" in error(folder, tmp_path / "typo")
    (tmp_path / "val" / "a").mkdir(parents=True)
    assert "has no folder train/; it needs train/ and val/" in error(folder, tmp_path)
    (tmp_path / "train").mkdir()
    assert f"{tmp_path / 'train'} holds no images" in error(folder, tmp_path)
    for place in ("train/a", "train/b", "val/a", "val/c"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for place in ("train/a", "val/a", "val/c"):
        Image.new("RGB", (9, 9)).save(tmp_path / place / "0.png")
    assert f"{tmp_path / 'train' / 'b'} holds no images" in error(folder, tmp_path)
    (tmp_path / "train" / "b").rmdir()
    assert "has one class only ('a')" in error(folder, tmp_path)
    (tmp_path / "train" / "b").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "b" / "0.png")
    assert "has the class 'c', which train/ does not have" in error(folder, tmp_path)
    assert "`resize` (=5) must be at least 8 pixels" in error(folder, tmp_path, size=8, resize=5)
    assert "`size` (=0) must be at least 1 pixels" in error(folder, tmp_path, size=0)
    assert "`workers` (=-1) must be at least 0" in error(folder, tmp_path, workers=-1)
    assert "`limit` (=0) must be at least 1" in error(folder, tmp_path, limit=0)


def test_real_photographs(data_root: Path) -> None:
    source = folder(data_root / "imagenette-mini", limit=40)
    task = make_task(source, batch_size=20)
    assert (source.classes, source.class_names[0], len(source.test)) == (10, "n01440764", 40)
    for x, y in task.test:
        assert x.shape[1:] == (3, 224, 224) and x.isfinite().all() and y.max() < 10
