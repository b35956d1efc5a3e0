"""What the README, the changelog and the cards say is so; the README's Python runs as it stands (with fewer epochs)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from inspect import get_annotations
from pathlib import Path

import pytest

from compress import stages
from compress.convert import convert
from compress.training import Training

README = Path(__file__).resolve().parents[1] / "README.md"


def run(code: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_blocks(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    load, compress, *uses = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    shown = run(re.sub(r"epochs=\d+", "epochs=1", compress), tmp_path)
    assert "outputs/runs/mine/model.safetensors {'correct':" in shown
    (tmp_path / "outputs/runs/mine").rename(tmp_path / "outputs/runs/shift_quant-small-digits")
    shown = run(load, tmp_path)
    assert "'order': 'gray'" in shown and "tensor([" in shown
    convert(tmp_path / "outputs/runs/shift_quant-small-digits/model.safetensors", ["onnx", "pt2", "pt2_x86"], tmp_path)
    assert len(uses) == 4
    for use in uses:
        if "openvino" in use and find_spec("openvino") is None:
            continue
        # Compiling takes half a minute; that it does what it should is another test's.
        before = "import torch\nimages = torch.randn(2, 1, 8, 8)\ntorch.compile = lambda model: model\n"
        assert run(before + use + "\nprint(tuple(logits.shape))", tmp_path) == "(2, 10)\n"


def rows(heading: str) -> set[str]:
    """The names in the first column of the section's own tables, of which benchmarks write none."""
    section = README.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    by_hand = re.sub(r"<!-- table:.*?<!-- end -->", "", section, flags=re.DOTALL)
    firsts = re.findall(r"^\| (`[^|]*`) \|", by_hand, flags=re.MULTILINE)
    return {name for first in firsts for name in re.findall(r"`([\w.]+)`", first)}


def files(folder: str) -> set[str]:
    return {file.stem for file in (README.parent / folder).glob("*.yaml")}


def test_the_readme_has_rows_for_what_there_is_and_for_nothing_else() -> None:
    assert rows("Recipes") == files("recipes")
    assert rows("Networks") == files("conf/model")
    assert rows("Stages") == {f"compress.stages.{name}" for name in stages.__all__}
    (data,) = re.findall(r"^\| `data` \| (.*) \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", data)) == files("conf/data")


def test_the_changelog_names_every_recipe_and_stage() -> None:
    text = (README.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in sorted({*files("recipes"), *stages.__all__}) if f"`{name}`" not in text] == []


def test_the_readme_says_which_stages_take_no_patterns() -> None:
    (named,) = re.findall(r"every stage but (.*?) takes `include` and `exclude`", README.read_text(encoding="utf-8"))
    without = {name for name in stages.__all__ if "exclude" not in {f.name for f in fields(getattr(stages, name))}}
    assert set(re.findall(r"`(\w+)`", named)) == without


@pytest.mark.parametrize("name", stages.__all__)
def test_a_stages_card_names_its_settings(name: str) -> None:
    stage = getattr(stages, name)
    card = sys.modules[stage.__module__].__doc__ or ""
    own = stage if name != "FineTune" else Training  # whose settings the card of FineTune explains
    settings = {field.name for field in fields(stage)} & set(get_annotations(own))
    assert [each for each in sorted(settings) if not re.search(rf"`[^`]*\b{each}\b[^`]*`", card)] == []
