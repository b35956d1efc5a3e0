"""What all sources share: their settings, the built-in digits, and fetching files."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import compress.data as sources
from compress.data import digits, fetch, make_task
from compress.errors import DataError

CONF = Path(__file__).resolve().parents[1] / "conf" / "data"


def error(function: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(DataError) as raised:
        function(*args, **kwargs)  # type: ignore[operator]
    return str(raised.value)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_yaml_file_shows_every_setting_with_the_default_of_the_factory(path: Path) -> None:
    node = dict(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    factory = getattr(sources, str(node.pop("_target_")).removeprefix("compress.data."))
    assert node.pop("seed") == "${seed}"
    assert {"batch_size", "calibration_images"} <= set(node)
    parameters = {k: p for k, p in inspect.signature(factory).parameters.items() if k != "seed"}
    assert set(node) - {"batch_size", "calibration_images"} == set(parameters)
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert node[name] == parameter.default, name


def test_digits_are_split_without_overlap_and_the_test_images_never_change() -> None:
    first, other = digits(seed=0), digits(seed=1)
    assert len(first.train) + len(first.val) + len(first.test) == 1797
    assert len(first.test) == 449 and len(first.val) == 180
    assert torch.equal(first.test.pixels, other.test.pixels)  # type: ignore[attr-defined]
    assert not torch.equal(first.val.pixels, other.val.pixels)  # type: ignore[attr-defined]
    assert first.fingerprint != other.fingerprint
    assert digits().fingerprint == first.fingerprint
    x = torch.cat([x for x, _ in make_task(first).train])
    assert x.shape[1:] == (1, 8, 8)
    assert abs(x.mean().item()) < 0.05 and abs(x.std().item() - 1) < 0.05


def test_digits_refuse_fractions_that_make_no_sense() -> None:
    assert "`val_fraction` (=0) must lie between 0 and 1" in error(digits, val_fraction=0)
    assert "`test_fraction` (=1.5) must lie between 0 and 1" in error(digits, test_fraction=1.5)
    assert "`val_images` (=1617) must be at least 1 and less than the 1348" in error(digits, val_fraction=0.9)
    assert "`limit` (=0) must be at least 1" in error(digits, limit=0)


def test_a_transfer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "server").write_bytes(b"abc")
    url = (tmp_path / "server").as_uri()
    target = tmp_path / "new" / "file"
    assert "try again, or put the right file at" in error(fetch.fetch, url, "0" * 32, target)
    assert list(target.parent.iterdir()) == []
    fetch.fetch(url, hashlib.md5(b"abc").hexdigest(), target)
    assert target.read_bytes() == b"abc" and len(list(target.parent.iterdir())) == 1
    (tmp_path / "file").write_bytes(b"")
    assert "could not be fetched" in error(fetch.fetch, url, "", tmp_path / "file" / "below")
