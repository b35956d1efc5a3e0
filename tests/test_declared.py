"""What the package imports is declared, and what an installation takes has its version in `constraints.txt`."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import FILES, imports

ROOT = Path(__file__).resolve().parents[1]
WITH_TORCH = {"triton"}  # torch's GPU builds bring it; imported where there is a GPU


def declared() -> set[str]:
    """The names of all dependencies, those of the extras too."""
    project = (ROOT / "pyproject.toml").read_text().partition("[project]")[2].partition("[project.scripts]")[0]
    lists = re.findall(r"^(?:dependencies|openvino|dev) = \[(.*?)\]$", project, flags=re.DOTALL | re.MULTILINE)
    return {canonicalize_name(name) for text in lists for name in re.findall(r'"([\w-]+)[<>=]', text)}


def test_what_is_imported_is_declared() -> None:
    named = {name.partition(".")[0] for file in FILES.values() for name in imports(file, typing=True)}
    others = named - {"compress", *sys.stdlib_module_names} - WITH_TORCH
    homes = packages_distributions()
    assert [name for name in sorted(others) if not declared() & {canonicalize_name(n) for n in homes[name]}] == []


def test_what_is_installed_has_its_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    wanted, seen = list(declared()), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # an extra that is not installed
            continue
        wanted += [canonicalize_name(n.name) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    # Only the GPU builds of torch want these, each in the version that torch names.
    gpu = {name for name in seen if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert sorted(seen - gpu - pinned) == []
