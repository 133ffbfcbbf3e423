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
from collections.abc import Callable

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image


def execute(
    source: pathlib.Path,
    target: pathlib.Path,
    seconds: int,
    on_cell: Callable[[nbformat.NotebookNode], None] | None = None,
) -> nbformat.NotebookNode:
    """Runs a notebook from the folder that this process runs in; returns it too.

    Args:
      source, target: The notebook, and where it is written with its outputs.
      seconds: Limit of a cell.
      on_cell: Is called with the notebook after each cell.
    """
    book = nbformat.read(source, as_version=4)
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
    nbformat.write(book, target)
    return book


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


def main() -> int:
    """Runs them all; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default="build/notebooks")
    parser.add_argument("--seconds", type=int, default=900, help="limit of a cell")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for outputs alone")
    parser.add_argument("--commit", default="", help="what to say was run, with --keep")
    arguments = parser.parse_args()
    for source in arguments.notebooks:
        if not source.is_file():
            print(f"{source}: no such file", file=sys.stderr)
            return 2
    for folder in filter(None, (arguments.out, arguments.keep)):
        folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for source in arguments.notebooks:
        begun = time.monotonic()
        kept, on_cell = None, None
        if arguments.keep is not None:
            kept = arguments.keep / f"{source.stem}.json"
            part = kept.with_suffix(".json.part")
            on_cell = functools.partial(keep, target=part, commit=arguments.commit)
        try:
            target = arguments.out / source.name
            book = execute(source, target, arguments.seconds, on_cell)
        except CellExecutionError as error:
            print(f"{source}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        if kept is not None:
            keep(book, kept, arguments.commit)
            part.unlink(missing_ok=True)
        print(f"{source}: {time.monotonic() - begun:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
