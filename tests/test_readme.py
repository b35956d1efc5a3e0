"""The README's Python runs as it stands there (with fewer epochs)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from compress.convert import convert

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


def test_recipes_and_models_named_in_the_readme_exist() -> None:
    text = README.read_text(encoding="utf-8")
    root = README.parent
    for folder, heading in (("recipes", "## Recipes"), ("conf/model", "## Your own"), ("conf/data", "## Your own")):
        section = text[text.index(heading) :]
        for file in (root / folder).glob("*.yaml"):
            assert f"`{file.stem}`" in section, file
