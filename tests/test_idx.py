"""MNIST and Fashion-MNIST: IDX files as they are, and broken in every way."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from compress.data import fashion_mnist, idx, make_task, mnist
from compress.errors import DataError


def error(function: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(DataError) as raised:
        function(*args, **kwargs)  # type: ignore[operator]
    return str(raised.value)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def made_idx(place: Path, ending: str = "", train: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Tiny IDX files with `train` and 6 images of 5x7; the training images and labels."""
    random = np.random.default_rng(0)
    place.mkdir(parents=True, exist_ok=True)
    for part, count in (("t10k", 6), ("train", train)):
        images = random.integers(0, 256, (count, 5, 7), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        write_idx(place / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(place / f"{part}-labels-idx1-ubyte{ending}", labels)
    return images, labels


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("factory", "place"), [(mnist, "MNIST/raw"), (fashion_mnist, "fashion_mnist"), (mnist, ".")])
def test_idx_files_arrive_as_they_are(tmp_path: Path, factory: object, place: str, ending: str) -> None:
    images, labels = made_idx(tmp_path / place, ending)
    source = factory(tmp_path, val_images=5, download=False)  # type: ignore[operator]
    assert (len(source.train), len(source.val), len(source.test)) == (15, 5, 6)
    wanted = {(tuple(x), y) for x, y in zip(images.reshape(20, -1).tolist(), labels.tolist(), strict=True)}
    found = {
        (tuple(x.flatten().tolist()), int(y))
        for part in (source.train, source.val)
        for x, y in zip(part.pixels, part.labels, strict=True)
    }
    assert found == wanted
    assert make_task(source, batch_size=4).example.shape == (2, 1, 5, 7)


def test_the_idx_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    made_idx(tmp_path)
    before = mnist(tmp_path, val_images=5).fingerprint
    path = tmp_path / idx.FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert mnist(tmp_path, val_images=5).fingerprint != before


def test_idx_files_are_fetched_when_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_idx(tmp_path / "server", ".gz")
    sums = {name: hashlib.md5((tmp_path / "server" / f"{name}.gz").read_bytes()).hexdigest() for name in idx.FILES}
    monkeypatch.setattr(idx, "MNIST_MD5", sums)
    monkeypatch.setattr(idx, "MNIST_URL", (tmp_path / "server").as_uri() + "/")
    assert len(mnist(tmp_path / "new", val_images=5).test) == 6
    (tmp_path / "new" / "mnist" / f"{idx.FILES[2]}.gz").unlink()
    assert len(mnist(tmp_path / "new", val_images=5).test) == 6
    monkeypatch.setattr(idx, "MNIST_URL", "http://127.0.0.1:9/")
    assert "could not be fetched from http://127.0.0.1:9/train-images" in error(mnist, tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_idx_files_that_are_absent(tmp_path: Path) -> None:
    assert f"`root` (='{tmp_path / 'typo'}') does not exist" in error(mnist, tmp_path / "typo", download=False)
    made_idx(tmp_path)
    (tmp_path / idx.FILES[1]).unlink()
    assert f"{tmp_path} lacks train-labels-idx1-ubyte" in error(mnist, tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_truncated_idx_file_is_refused_at_every_length(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    write_idx(path, np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    whole = path.read_bytes()
    assert idx.read_idx(path, 3).flatten().tolist() == list(range(60))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert str(path) in error(idx.read_idx, path, 3)


def test_idx_files_of_another_kind(tmp_path: Path) -> None:
    made_idx(tmp_path)
    images, labels = tmp_path / idx.FILES[0], tmp_path / idx.FILES[1]
    whole, numbers = images.read_bytes(), labels.read_bytes()
    images.write_bytes(whole + b"x")
    assert "is too long: its header declares 700 bytes (20x5x7)." in error(mnist, tmp_path)
    images.write_bytes(whole[:-1])
    assert f"{images} is truncated: its header declares 700 bytes" in error(mnist, tmp_path)
    images.write_bytes(numbers)
    assert "starts with 00 00 08 01; an IDX file of 3-dimensional bytes starts with 00 00 08 03" in error(
        mnist, tmp_path
    )
    images.write_bytes(whole[:4] + b"\xff" * 12)
    assert "has a broken header: it declares the sizes [4294967295," in error(mnist, tmp_path)
    images.write_bytes(whole)
    write_idx(labels, np.zeros(19, np.uint8))
    assert f"holds 20 images, but {labels} holds 19 labels" in error(mnist, tmp_path)
    write_idx(labels, np.full(20, 10, np.uint8))
    assert "must hold labels from 0 to 9" in error(mnist, tmp_path)
