"""The folders of a run: where it writes, and where finished stages are stored."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ConfigError
from compress.files import UNFINISHED
from compress.targets import collecting


def fresh(out: Path) -> Path:
    """Make the folder `out`; or `out-2`, `out-3`, ... where it exists and holds something."""
    number, folder = 1, out
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                (folder / UNFINISHED).mkdir()  # fails for all but one of two runs that start at once
                return folder
        except FileExistsError:
            pass
        number += 1
        folder = out.with_name(f"{out.name}-{number}")


def require_writable(key: str, folder: Path) -> None:
    """Raise `ConfigError` unless files can be written in `folder`, which need not exist; leaves nothing behind."""
    place = folder.absolute()
    try:
        place = next(p for p in (place, *place.parents) if p.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ConfigError(
            f"`{key}` (={folder}) cannot be written: {place}: {error.strerror}; choose another folder."
        ) from error


def stores(settings: Mapping[str, Any]) -> bool:
    """Whether finished stages are kept."""
    return settings["cache"] not in (None, False, "off")


def named_folder(key: str, value: Any, example: str, problems: list[str]) -> Path:
    """The folder that a setting names; adds to `problems` where it names none, or one that cannot be written."""
    folder = Path(str(value))
    if value is None or isinstance(value, bool | list | dict) or folder.name in ("", ".."):
        problems.append(f"`{key}` (={value}) must be the name of a folder, such as {example}.")
    else:
        with collecting(problems):
            require_writable(key, folder)
    return folder
