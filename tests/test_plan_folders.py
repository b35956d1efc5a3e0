"""The folders of a run: which settings name one that can be written, and that no run writes into another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_config import problems, settings

from compress import folders, plan
from compress.errors import ConfigError


@pytest.mark.parametrize("value", [None, True, "", ".", "..", "/", ["a"]])
@pytest.mark.parametrize("key", ["out", "cache"])
def test_a_setting_that_names_no_folder(tmp_path: Path, key: str, value: Any) -> None:
    if (key, value) != ("cache", None):  # which is off
        (problem,) = problems(tmp_path, **{key: value})
        assert problem.startswith(f"`{key}` (={value}) must be the name of a folder, such as outputs/")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"`out` \(=.*file/out\) cannot be written: .*file: Not a directory"):
        plan.make(settings(tmp_path, out=str(tmp_path / "file" / "out")))
    with pytest.raises(ConfigError, match=r"`cache` \(=/proc/cache\) cannot be written"):
        plan.make(settings(tmp_path, cache="/proc/cache"))


def test_a_setting_that_was_taken_out(tmp_path: Path) -> None:
    given = settings(tmp_path)
    del given["cache"]
    with pytest.raises(ConfigError, match=r"`cache` must be given; leave out ~cache\."):
        plan.make(given)


@pytest.mark.parametrize("off", [None, False, "off"])
def test_a_store_that_is_off(tmp_path: Path, off: Any) -> None:
    assert plan.make(settings(tmp_path, cache=off)).cache is None


def test_a_run_never_writes_into_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    out.mkdir(parents=True)
    assert folders.fresh(out) == out  # empty, and so taken
    assert folders.fresh(out) == tmp_path / "runs" / "a-2"  # the first is a run's, though it has written nothing yet
    (tmp_path / "runs" / "a-3").touch()
    assert folders.fresh(out) == tmp_path / "runs" / "a-4"
