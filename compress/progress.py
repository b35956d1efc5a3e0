"""How far a long piece of work is: bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text


class Bars:
    """A `Progress` of bars that vanish when they end. Work may be nested: the innermost start is the one that steps."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr)
        self._bars: Progress | None = None
        self._tasks: list[TaskID] = []

    def start(self, what: str, total: int) -> None:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                Remaining(),
                TextColumn("{task.fields[note]}", markup=False, style="dim"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        self._tasks.append(self._bars.add_task(what, total=total or None, note=""))

    def step(self, note: str = "") -> None:
        if self._bars is not None and self._tasks:
            self._bars.update(self._tasks[-1], advance=1, note=note)

    def end(self) -> None:
        if self._bars is None or not self._tasks:
            return
        ended = self._tasks.pop()
        done = next(task for task in self._bars.tasks if task.id == ended)
        line = f"{done.description}: done in {done.elapsed or 0:.0f} s {done.fields['note']}".rstrip()
        self._bars.remove_task(ended)
        self._console.print(Text(line, style="dim"))
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Give the terminal back, whatever has not ended; for work that was broken off."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()


@dataclass
class _Piece:
    what: str
    total: int
    begun: float
    said: float
    done: int = 0
    note: str = ""


class Lines:
    """A `Progress` of plain lines: one at the start, one at the end, between them at most one every `every` seconds."""

    def __init__(
        self, stream: TextIO | None = None, every: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._every, self._clock = every, clock
        self._pieces: list[_Piece] = []

    def start(self, what: str, total: int) -> None:
        now = self._clock()
        self._pieces.append(_Piece(what, total, now, now))
        self._say(f"{what}: {total} steps" if total else what)

    def step(self, note: str = "") -> None:
        if not self._pieces:
            return
        piece, now = self._pieces[-1], self._clock()
        piece.done += 1
        piece.note = note or piece.note
        if now - piece.said >= self._every and piece.done != piece.total:
            piece.said = now
            share = f" of {piece.total} ({100 * piece.done // piece.total} %)" if piece.total else ""
            self._say(f"{piece.what}: {piece.done}{share}, {now - piece.begun:.0f} s", piece.note)

    def end(self) -> None:
        if self._pieces:
            piece = self._pieces.pop()
            self._say(f"{piece.what}: done in {self._clock() - piece.begun:.0f} s", piece.note)

    def close(self) -> None:
        """Forget whatever has not ended; for work that was broken off."""
        self._pieces.clear()

    def _say(self, text: str, note: str = "") -> None:
        print(f"{text}, {note}" if note else text, file=self._stream, flush=True)


def make(stream: TextIO | None = None) -> Bars | Lines:
    """Bars where `stream` (standard error unless given) is a terminal that can redraw, plain lines elsewhere."""
    stream = stream or sys.stderr
    return Bars(stream) if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") else Lines(stream)
