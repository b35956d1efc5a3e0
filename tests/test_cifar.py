"""CIFAR-10: pickles, archive, checksums; a pickle that wants to run something does not."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.data import cifar, cifar10, make_task
from compress.errors import DataError
from compress.models import resnet20
from compress.models.weights import load_weights

Made = tuple[Path, np.ndarray, list[int]]


def error(function: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(DataError) as raised:
        function(*args, **kwargs)  # type: ignore[operator]
    return str(raised.value)


@pytest.fixture
def made_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A tiny CIFAR-10 of 4 images a file, with its own checksums: root, training pixels, training labels."""
    random = np.random.default_rng(0)
    (tmp_path / cifar.FOLDER).mkdir()
    pixels, labels = [], []
    for table in ("TRAIN_MD5", "TEST_MD5"):
        sums = {}
        for name in getattr(cifar, table):
            images = random.integers(0, 256, (4, 3072), dtype=np.uint8)
            numbers = random.integers(0, 10, 4).tolist()
            data = pickle.dumps({b"data": images, b"labels": numbers, b"filenames": [b"x.png"]}, protocol=2)
            (tmp_path / cifar.FOLDER / name).write_bytes(data)
            sums[name] = hashlib.md5(data).hexdigest()
            if table == "TRAIN_MD5":
                pixels.append(images)
                labels += numbers
        monkeypatch.setattr(cifar, table, sums)
    return tmp_path, np.concatenate(pixels), labels


def pack(root: Path, monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """Move the made files into an archive at `target`, with its checksum."""
    with tarfile.open(target, "w:gz") as tar:
        tar.add(root / cifar.FOLDER, arcname=cifar.FOLDER)
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(target.read_bytes()).hexdigest())
    for path in (root / cifar.FOLDER).iterdir():
        path.unlink()
    (root / cifar.FOLDER).rmdir()


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_pixels_and_labels_arrive_as_they_are_in_the_files(made_cifar: Made, inside: bool) -> None:
    root, pixels, labels = made_cifar
    source = cifar10(root / cifar.FOLDER if inside else root, val_images=6, download=False)
    assert (len(source.train), len(source.val), len(source.test)) == (14, 6, 4)
    wanted = {(tuple(image), label) for image, label in zip(pixels.tolist(), labels, strict=True)}
    found = set()
    for part in (source.train, source.val):
        for images, numbers in part.batches([torch.arange(len(part))]):
            assert images.shape[1:] == (3, 32, 32)
            found |= {(tuple(x.flatten().tolist()), int(y)) for x, y in zip(images, numbers, strict=True)}
    assert found == wanted


def test_cifar_is_unpacked_from_its_archive_and_fetched_when_absent(
    made_cifar: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, _ = made_cifar
    before = cifar10(root, val_images=6).fingerprint
    server = tmp_path / "server.tar.gz"
    pack(root, monkeypatch, server)
    monkeypatch.setattr(cifar, "URL", server.as_uri())
    assert cifar10(root / "new", val_images=6).fingerprint == before
    assert sorted(path.name for path in (root / "new").iterdir()) == [cifar.FOLDER, cifar.ARCHIVE]
    server.rename(root / cifar.ARCHIVE)
    assert cifar10(root, val_images=6, download=False).fingerprint == before


def test_cifar_with_a_wrong_checksum_names_the_file(made_cifar: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _, _ = made_cifar
    path = root / cifar.FOLDER / "data_batch_3"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    text = error(cifar10, root, val_images=6)
    assert str(path) in text and "it is truncated or altered; delete" in text
    path.unlink()
    assert f"{root / cifar.FOLDER} lacks data_batch_3" in error(cifar10, root, val_images=6)
    path.write_bytes(whole)
    pack(root, monkeypatch, root / cifar.ARCHIVE)
    (root / cifar.ARCHIVE).write_bytes((root / cifar.ARCHIVE).read_bytes()[:-9])
    text = error(cifar10, root, val_images=6)
    assert str(root / cifar.ARCHIVE) in text and "it is truncated or altered" in text
    assert not (root / cifar.FOLDER).exists()


def test_cifar_that_is_absent_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "typo"
    assert f"`root` (='{missing}') does not exist; it should hold cifar-10-batches-py/" in error(
        cifar10, missing, download=False
    )
    monkeypatch.setattr(cifar, "URL", "http://127.0.0.1:9/cifar.tar.gz")
    text = error(cifar10, missing)
    assert "could not be fetched from http://127.0.0.1:9/cifar.tar.gz" in text and "Set `data.root`" in text
    server = tmp_path / "server"
    server.write_bytes(b"not it")
    monkeypatch.setattr(cifar, "URL", server.as_uri())
    assert f"but {cifar.ARCHIVE_MD5} is the published one" in error(cifar10, missing)
    assert not missing.exists() or not any(missing.iterdir())
    assert "`root` is empty" in error(cifar10, "")


def test_cifar_refuses_to_hold_out_everything(made_cifar: Made) -> None:
    assert "`val_images` (=20) must be at least 1 and less than the 20" in error(cifar10, made_cifar[0], val_images=20)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_hostile_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        text = error(cifar.batch, pickle.dumps({b"data": Hostile()}, protocol), "data_batch_1")
        assert "data_batch_1 is a pickle that asks for" in text and "system; only arrays" in text
    assert not (tmp_path / "pwned").exists()


def test_a_truncated_pickle_is_refused_at_every_length() -> None:
    data = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}, protocol=2)
    assert cifar.batch(data, "x")[1] == [3]
    for length in [*range(0, 200), *range(len(data) - 60, len(data))]:
        assert "x is a truncated or broken pickle" in error(cifar.batch, data[:length], "x")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.float32), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
    ],
)
def test_a_pickle_of_something_else(content: object) -> None:
    assert "x is not a CIFAR-10 batch" in error(cifar.batch, pickle.dumps(content, protocol=2), "x")


def test_the_real_cifar10(data_root: Path) -> None:
    source = cifar10(data_root, download=False)
    assert (len(source.train), len(source.val), len(source.test)) == (45000, 5000, 10000)
    assert torch.bincount(source.test.labels).tolist() == [1000] * 10
    assert torch.equal(torch.bincount(source.train.labels) + torch.bincount(source.val.labels), torch.full((10,), 5000))
    # Published weights are right on 91.73 % of the test images: channel order, layout and input description are, too.
    task, model = make_task(cifar10(data_root, download=False, limit=512)), resnet20().eval()
    load_weights(model, data_root / "weights" / "resnet20-12fca82f.th")
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in task.test)
    assert correct >= 0.88 * 512
