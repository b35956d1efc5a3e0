"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from compress.errors import UserError

UNFINISHED = "unfinished"  # in a run's folder: what it works in, and removes when it ends well


def write(path: Path, data: bytes | str) -> None:
    """Write a file beside itself first, sync it, then rename it over what was there. Text becomes UTF-8.

    Raises:
        UserError: the file cannot be written; what was there is still there, and nothing else is left.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"`{path}` cannot be written: {error.strerror or error}; is the disk full or the folder read-only?"
        ) from error
