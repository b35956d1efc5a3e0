"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real inputs (CIFAR-10, imagenette-mini, published weights); skips where there is none."""
    given = os.environ.get("COMPRESS_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"needs real data: {root} is not a folder (set COMPRESS_DATA)")
    return root
