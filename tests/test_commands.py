"""Every command line that the help, the README and the recipes show composes, and passes the check before a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.__main__ import check, compose
from compress.config import CONF, RECIPES, Job
from compress.targets import factory

README = Path(__file__).resolve().parents[1] / "README.md"
MODELS, DATA = (sorted(file.stem for file in (CONF / group).glob("*.yaml")) for group in ("model", "data"))
NET = """\
from torch import nn

def mynet(classes, channels):
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(channels, 8, 3))
    model.add_module("body", nn.Conv2d(8, classes, 3))
    return model
"""


def shown() -> Iterator[str]:
    """The command lines, each once, without the settings of a template such as `[key=value ...]`."""
    for file in (README, CONF / "config.yaml", *sorted(RECIPES.glob("*.yaml"))):
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^[# ]+(python -m compress .*)$", text, flags=re.MULTILINE):
            if not re.search(r"--help|NAME", line):
                yield " ".join(line.partition("  #")[0].split())


COMMANDS = list(dict.fromkeys(shown()))


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    """The data node of images that are always there."""
    (job,) = compose(["recipe=int8"])
    data = job.settings["data"]
    assert isinstance(data, dict)
    return data


def on(job: Job, data: dict[str, Any]) -> Job:
    """The run with other images, and without a file of weights."""
    return replace(job, settings={**job.settings, "data": data, "model": {**job.settings["model"], "weights": None}})


def test_commands_are_found() -> None:
    assert len(COMMANDS) > len(list(RECIPES.glob("*.yaml")))
    assert any("glob(*" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_shown_can_be_typed(
    command: str, digits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mypackage.py").write_text(NET)
    (tmp_path / "my_recipes").mkdir()
    own = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "my_recipes" / "mine.yaml").write_text(own[-1])
    words = shlex.split(command.replace("$HOME", "/home/me"))[3:]
    jobs = compose(words)
    assert (len(jobs) > 1) == ("-m" in words)
    check([on(job, digits) for job in jobs])


@pytest.mark.parametrize("data", DATA)
def test_every_data_file_names_settings_that_there_are(data: str) -> None:
    (job,) = compose(["recipe=int8", f"data={data}"])
    problems: list[str] = []
    factory("data", job.settings["data"], ("batch_size", "calibration_images"), problems)
    assert problems == []


@pytest.mark.parametrize("model", MODELS)
def test_every_model_file_composes(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = compose(["recipe=int8", f"model={model}"])
    check([job])
