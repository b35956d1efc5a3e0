"""Fetching a published file: checked against its MD5 before it gets its name, so half a file is never taken for one."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from compress.errors import DataError

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte


def fetch(url: str, md5: str, path: Path) -> None:
    """Fetch `url` into `path`, whose folder is made when the server has answered.

    Raises:
        DataError: no answer, a transfer that breaks off, a wrong checksum, or a folder that cannot be written.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                digest = hashlib.md5(usedforsecurity=False)
                with os.fdopen(handle, "wb") as file:
                    while chunk := answer.read(CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                if digest.hexdigest() != md5:
                    raise DataError(
                        f"{url} gave a file with MD5 {digest.hexdigest()}, but {md5} is the published one: the "
                        f"transfer broke off, or the file has changed; try again, or put the right file at {path}."
                    )
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
    except (OSError, HTTPException) as error:  # urllib's own errors are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        folder = "" if path.parent.is_dir() else ", nor is its folder,"
        raise DataError(
            f"{path} is not there{folder} and could not be fetched from {url} ({reason}). Set `data.root` to a folder "
            f"that holds the files, or fetch {url} where there is a network and put it at {path}."
        ) from error


def md5_of(data: bytes) -> str:
    """The MD5 of some bytes, which guards against damage, not against malice."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
