"""Executes notebooks and writes them with their outputs; `make notebooks` calls it.

    python scripts/run_notebooks.py notebooks/*.ipynb --out build/notebooks

A cell that fails ends the run with its traceback and status 1.
"""

import argparse
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def execute(source: pathlib.Path, target: pathlib.Path, seconds: int) -> None:
    """Runs a notebook from the folder that this process runs in."""
    book = nbformat.read(source, as_version=4)
    client = NotebookClient(
        book,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": "."}},
    )
    client.execute()
    nbformat.write(book, target)


def main() -> int:
    """Runs them all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default="build/notebooks")
    parser.add_argument("--seconds", type=int, default=900, help="limit of a cell")
    arguments = parser.parse_args()
    for source in arguments.notebooks:
        if not source.is_file():
            print(f"{source}: no such file", file=sys.stderr)
            return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for source in arguments.notebooks:
        begun = time.monotonic()
        try:
            execute(source, arguments.out / source.name, arguments.seconds)
        except CellExecutionError as error:
            print(f"{source}: {error}", file=sys.stderr)
            return 1
        print(f"{source}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
