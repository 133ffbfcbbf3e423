"""Executes notebooks and writes them with their outputs; `make notebooks` calls it.

    python scripts/run_notebooks.py notebooks/*.ipynb --out build/notebooks

Every cell's time is printed as it ends. A notebook whose cell fails is told with its
traceback and not written; the others are still run, and the status is 1.

`--keep FOLDER` also writes what cells gave, without the cells, as the documentation
shows it. Until a notebook has ended, and where it did not, its name ends in `.part`.
"""

import argparse
import base64
import datetime
import functools
import io
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from sparda_jax.checks import ConfigError, integer
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.cli.packages import command_needs

with command_needs("notebooks", __name__):
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from PIL import Image


def execute(
    book: nbformat.NotebookNode,
    source: pathlib.Path,
    seconds: int,
    on_cell: Callable[[nbformat.NotebookNode], None] | None = None,
) -> None:
    """Runs a notebook from the folder that this process runs in.

    Args:
      book: It gets its outputs.
      source: Its file, for what is printed.
      seconds: Limit of a cell.
      on_cell: Is called with the notebook after each cell.
    """
    begun = time.monotonic()

    def executed(cell: nbformat.NotebookNode, cell_index: int, **_: object) -> None:
        if cell.cell_type != "code":
            return
        took = time.monotonic() - begun
        print(f"{source}: cell {cell_index} ended at {took:.0f} s", flush=True)
        if on_cell is not None:
            on_cell(book)

    client = NotebookClient(
        book,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": "."}},
        on_cell_executed=executed,
    )
    client.execute()


def keep(book: nbformat.NotebookNode, target: pathlib.Path, commit: str) -> None:
    """Writes what the code cells printed and drew, each with its source."""
    cells = [
        {"source": cell.source, "outputs": _kept(cell.outputs)}
        for cell in book.cells
        if cell.cell_type == "code"
    ]
    made = {"date": datetime.date.today().isoformat(), "commit": commit}
    text = json.dumps(made | {"cells": cells}, indent=1, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")


def _kept(outputs: list[nbformat.NotebookNode]) -> list[dict[str, str]]:
    """Texts of standard output, joined, and pictures; nothing else is shown."""
    found: list[dict[str, str]] = []
    for output in outputs:
        picture = output.get("data", {}).get("image/png")
        if picture is not None:
            found.append({"png": smaller("".join(picture.split()))})
        elif output.get("name") != "stdout":
            continue
        elif found and "text" in found[-1]:
            found[-1]["text"] += output.text
        else:
            found.append({"text": output.text})
    return found


def smaller(picture: str) -> str:
    """A PNG, in base64, with a palette of 128 colours: enough for a plot."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    held = io.BytesIO()
    image.quantize(128).save(held, "png", optimize=True)
    return base64.b64encode(held.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs them all; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default="build/notebooks")
    add_option(
        parser, "--seconds", integer(1), metavar="N", default=900, help="of a cell"
    )
    parser.add_argument("--keep", type=pathlib.Path, help="folder for outputs alone")
    parser.add_argument("--commit", default="", help="what to say was run, with --keep")
    failed: list[pathlib.Path] = []
    status = run_command(lambda: _run(parser.parse_args(argv), failed))
    return status or int(bool(failed))


def _read(source: pathlib.Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(source, as_version=4)
    except FileNotFoundError as error:
        raise ConfigError(f"{source}: no such file") from error
    except (nbformat.ValidationError, nbformat.reader.NotJSONError) as error:
        raise ConfigError(f"{source} is no notebook: {error}") from error


def _run(arguments: argparse.Namespace, failed: list[pathlib.Path]) -> None:
    books = [(source, _read(source)) for source in arguments.notebooks]
    for folder in filter(None, (arguments.out, arguments.keep)):
        folder.mkdir(parents=True, exist_ok=True)
    for source, book in books:
        begun = time.monotonic()
        kept, on_cell = None, None
        if arguments.keep is not None:
            kept = arguments.keep / f"{source.stem}.json"
            part = kept.with_suffix(".json.part")
            on_cell = functools.partial(keep, target=part, commit=arguments.commit)
        try:
            execute(book, source, arguments.seconds, on_cell)
        except CellExecutionError as error:
            print(f"{source}: {error}", file=sys.stderr, flush=True)
            failed.append(source)
            continue
        nbformat.write(book, arguments.out / source.name)
        if kept is not None:
            keep(book, kept, arguments.commit)
            part.unlink(missing_ok=True)
        print(f"{source}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
