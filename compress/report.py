"""What a run found: `report.json` for machines, `report.html` for people, a table for the terminal.

`python -m compress.report FILE.json` prints the table again and writes the page beside the file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.errors import UserError
from compress.files import write as write_file
from compress.wording import COLUMNS, cells, remarks, title

FORMAT = 1
Json = dict[str, Any]


def write(result: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`, each at once or not at all; gives back their paths.

    A figure that is not finite becomes null. The page is made from what the file says and needs nothing beside it.

    Raises:
        UserError: not a result of this format, or a folder that cannot be written.
    """
    _check(result, "result")
    finite = _finite(dict(result))
    data, page = Path(folder) / "report.json", Path(folder) / "report.html"
    write_file(data, json.dumps(finite, indent=1, ensure_ascii=False) + "\n")
    from compress.page import render  # matplotlib and jinja2 take a second to load, and only a page needs them

    write_file(page, render(finite))
    return data, page


def read(path: Path) -> Json:
    """The result in a report.json.

    Raises:
        UserError: a file that is not there, not JSON, or not a result of this format.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` cannot be read as a report.json: {error}.") from error
    _check(result, str(path))
    return dict(result)


def table(result: Mapping[str, Any]) -> Table:
    """The rows of a result as a rich table."""
    return _table(title(result), COLUMNS, cells(result["rows"]))


def _table(heading: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title=Text(heading), title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        shown.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for line in lines:
        shown.add_row(*(Text(cell) for cell in line))
    return shown


def show(result: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the table and what was written: with rich on a terminal, plain aligned lines elsewhere."""
    show_lines(title(result), COLUMNS, cells(result["rows"]), remarks(result), stream)


def show_lines(
    heading: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    below: Sequence[str],
    stream: TextIO | None = None,
) -> None:
    """Print a table, its first column to the left and the others to the right, and lines of text below it."""
    stream = stream or sys.stdout
    if stream.isatty():
        console = Console(file=stream)
        console.print(_table(heading, columns, lines))
        for line in below:
            console.print(Text(line))
        return
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    _print(heading, stream)
    for texts in (columns, *lines):
        parts = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(texts, widths, strict=True))]
        _print("  ".join(parts).rstrip(), stream)
    for line in below:
        _print(line, stream)


def _check(result: Any, name: str) -> None:
    if not isinstance(result, Mapping) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, Mapping) else type(result).__name__
        raise UserError(f"`{name}` must be a result of format {FORMAT}; it has {found!r}. Run the recipe again.")
    missing = [key for key in ("recipe", "seed", "target", "model", "data", "rows") if key not in result]
    if missing or not result["rows"]:
        raise UserError(f"`{name}` must have rows and all of its parts; it lacks {', '.join(missing) or 'rows'}.")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def _print(text: str, stream: TextIO) -> None:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.replace("±", "+-").encode("ascii", "replace").decode()
    print(text, file=stream)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a report.json as a table and write its page beside it; the exit code is 2 where that cannot be done."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m compress.report FILE.json", file=sys.stderr)
        return 0 if given in (["-h"], ["--help"]) else 2
    try:
        from compress.page import render

        path = Path(given[0])
        result = read(path)
        show(result)
        write_file(path.with_suffix(".html"), render(result))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
