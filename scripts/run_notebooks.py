"""Executes notebooks and writes them with their outputs; `make notebooks` calls it.

    python scripts/run_notebooks.py notebooks/*.ipynb --out build/notebooks

A notebook whose cell fails is told with its traceback and not written; the others are
still run, and the status is 1. `--keep FOLDER` also writes what cells gave, without the
cells, as the documentation shows it.
"""

import argparse
import base64
import datetime
import io
import json
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image


def execute(
    source: pathlib.Path, target: pathlib.Path, seconds: int
) -> nbformat.NotebookNode:
    """Runs a notebook from the folder that this process runs in; returns it too."""
    book = nbformat.read(source, as_version=4)
    client = NotebookClient(
        book,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": "."}},
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
        try:
            book = execute(source, arguments.out / source.name, arguments.seconds)
        except CellExecutionError as error:
            print(f"{source}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        if arguments.keep is not None:
            keep(book, arguments.keep / f"{source.stem}.json", arguments.commit)
        print(f"{source}: {time.monotonic() - begun:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
