"""What has been done is not done again: each stage's outcome, under a key made of all that it depends on.

An entry is a folder: `model.safetensors` (the model in training form), `edit.json` (what the stage decided, written
last: without it the entry is unfinished), and `work/`, where a stage that takes long leaves its state, so that a killed
run goes on in the middle of it. One lock for each key lets two processes use the store at once; a lock dies with its
process.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from compress import __version__, checkpoint
from compress.constructors import Build
from compress.errors import UserError
from compress.files import write
from compress.stage import Edit, Site, Stage
from compress.task import Task

PACKAGE = Path(__file__).parent
# All other files of the package can change a stage's outcome.
NO_OUTCOME = (
    "__main__.py",
    "config.py",
    "convert.py",
    "machine.py",
    "page.py",
    "plan.py",
    "plots.py",
    "progress.py",
    "report.py",
    "rows.py",
    "sweep.py",
    "wording.py",
)


@cache
def source_digest() -> str:
    """A digest of this package's code that computes outcomes, so that changed code never finds old ones."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name not in NO_OUTCOME:
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def key(parent: str, what: Any, task: Task) -> str:
    """The key of what comes out when `what` (plain JSON) is done to the outcome of key `parent` for this task."""
    parts = {
        "parent": parent,
        "what": what,
        "data": task.fingerprint,
        "seed": task.seed,
        "device": task.device.type,
        "precision": task.precision,
        "threads": torch.get_num_threads() if task.device.type == "cpu" else None,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "torchao": version("torchao"),
        "compress": f"{__version__}+{source_digest()}",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def described(stage: Stage) -> dict[str, Any]:
    """A stage as plain JSON: its class and every setting."""
    settings = asdict(stage)  # type: ignore[call-overload]  # stages are dataclasses, which a Protocol cannot say
    return {"stage": f"{type(stage).__module__}.{type(stage).__qualname__}", **settings}


def files_of(stage: Stage) -> dict[str, str]:
    """Digests of the files that settings of the stage name, by setting."""
    paths = {name: getattr(stage, name) for name in getattr(stage, "files", ())}
    return {name: file_digest(Path(path)) for name, path in paths.items() if path}


def code_of(thing: Any) -> str | None:
    """A digest of the file that defines a class or function, so that changed code never finds old outcomes."""
    try:
        return file_digest(Path(inspect.getfile(thing)))
    except (TypeError, OSError):
        return None


def state_digest(model: nn.Module) -> str:
    """A digest of every tensor of a model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def home(build: Build | None) -> list[str]:
    """What `checkpoint.load` has to allow for a base that comes from this factory."""
    return [build[0].rpartition(".")[0]] if build else []


@dataclass(frozen=True)
class Done:
    """A stage's outcome, its key, the seconds it took (when it was done, if it was found), and whether it was found."""

    edit: Edit
    key: str
    seconds: float
    hit: bool

    def on(self, device: torch.device) -> Done:
        """The same with its model on `device`."""
        return replace(self, edit=replace(self.edit, model=self.edit.model.to(device)))


@dataclass(frozen=True)
class Entry:
    """One key's folder in the store, or, without a store, a folder of the run that nobody looks into again."""

    folder: Path
    build: Build | None

    @property
    def work(self) -> Path:
        """The stage's own folder; survives until the stage is done."""
        path = self.folder / "work"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def load(self) -> Done | None:
        """The stored outcome; None where there is none, or none that can be read."""
        try:
            record = json.loads((self.folder / "edit.json").read_text(encoding="utf-8"))
            model = checkpoint.load(self.folder / "model.safetensors", allow=home(self.build))
            sites = tuple(Site(**site) for site in record["sites"])
            return Done(Edit(model, sites, record["notes"]), self.folder.name, float(record["seconds"]), True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, done: Done, input: Mapping[str, Any]) -> Done:
        """Store an outcome, and give back the one to go on with: what was stored, as a later run would find it."""
        if self.build is None:
            return done
        (self.folder / "edit.json").unlink(missing_ok=True)
        path = self.folder / "model.safetensors"
        about: dict[str, Any] = {"input": input, "provenance": {}, "results": {}}
        checkpoint.save(done.edit.model, path, build=self.build, form="training", **about)
        model = checkpoint.load(path, allow=home(self.build))
        sites, notes = [asdict(site) for site in done.edit.sites], dict(done.edit.notes)
        record = json.dumps({"sites": sites, "notes": notes, "seconds": done.seconds})
        write(self.folder / "edit.json", record)
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        return replace(done, edit=replace(done.edit, model=model))


@contextmanager
def entry(store: Path | None, scratch: Path, key: str, build: Build | None) -> Iterator[Entry]:
    """The entry of `key`, locked against other processes; in `scratch` where there is no store or no `build`."""
    if store is None or build is None:
        folder = scratch / key
        folder.mkdir(parents=True, exist_ok=True)
        yield Entry(folder, build)
        return
    folder = store / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`cache` (={store}) cannot be written: {error.strerror}; choose another, or `off`.") from error
    with FileLock(store / f"{key}.lock"):
        yield Entry(folder, build)
