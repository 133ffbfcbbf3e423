"""Writes the repository's public address where it is needed; a fork runs it once.

    python scripts/set_address.py https://github.com/OWNER/NAME

mkdocs.yml gets it as `repo_url`, which gives the pages of the notebooks their badges;
every notebook gets a badge under its title that opens it in Colab, and SOURCE in its
first cell, which is what is installed there. Another address replaces the first.
"""

import json
import pathlib
import re
from typing import Any

from docs_hooks import ROOT, colab_badge, is_badge, read_cells, read_kept

from sparda_jax.checkpoint.atomic import write_text
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checks import ConfigError
from sparda_jax.cli.ending import run_command
from sparda_jax.cli.options import HelpFormatter, Parser

# With its comment behind it, in brackets; or with the comment above it, which a
# formatter leaves as it is, whatever the length of the address.
_SOURCE = re.compile(
    r'^SOURCE = (?:\(\n    "[^"\n]*"  (?P<comment># .*)\n\)|"[^"\n]*")$', re.M
)


def set_address(root: pathlib.Path, address: str) -> None:
    """Puts an address into mkdocs.yml, the notebooks and their kept outputs.

    Args:
      root: Of the repository.
      address: Such as https://github.com/OWNER/NAME.

    Raises:
      ConfigError: If it is no address of a repository on GitHub, which Colab opens.
      CheckpointError: If a notebook or what it gave is damaged: nothing is written.
    """
    if colab_badge(address, "x.ipynb") is None:
        raise ConfigError(
            f"ADDRESS={address!r} is not allowed: it must be like "
            "https://github.com/OWNER/NAME"
        )
    address = address.rstrip("/").removesuffix(".git")
    changed = {}
    for place in sorted((root / "notebooks").glob("*.ipynb")):
        changed[place] = _notebook_with(place, address)
        kept = root / "notebooks" / "outputs" / f"{place.stem}.json"
        if kept.is_file():
            changed[kept] = read_kept(kept)
            first = changed[kept]["cells"][0]
            first["source"] = _with_source(first["source"], address)
    settings = root / "mkdocs.yml"
    text = re.sub(r"^repo_url: .*\n", "", settings.read_text("utf-8"), flags=re.M)
    line = f"\\g<0>repo_url: {address}\n"
    write_text(settings, re.sub(r"^site_name: .*\n", line, text, flags=re.M))
    for place, value in changed.items():
        write_text(place, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _notebook_with(place: pathlib.Path, address: str) -> dict[str, Any]:
    """A notebook with its badge, and the address in its first cell of code."""
    book = read_cells(place)
    cells = book["cells"]
    title, *words = _source(cells[0]).splitlines() or [""]
    if cells[0]["cell_type"] != "markdown" or not title.startswith("# "):
        raise CheckpointError(f"{place}: must begin with a title, as in # Words")
    words = "\n".join(line for line in words if not is_badge(line)).strip("\n")
    badge = colab_badge(address, place.name)
    _change(cells[0], f"{title}\n\n{badge}\n\n{words}")
    first = next((cell for cell in cells if cell["cell_type"] == "code"), None)
    if first is None:
        raise CheckpointError(f"{place}: has no cell of code")
    _change(first, _with_source(_source(first), address))
    return book


def _source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _change(cell: dict[str, Any], text: str) -> None:
    """Sets a cell's text, as lines or in one as it was."""
    lines = isinstance(cell["source"], list)
    cell["source"] = text.splitlines(keepends=True) if lines else text


def _with_source(cell: str, address: str) -> str:
    def written(found: re.Match) -> str:
        above = f"{found['comment']}\n" if found["comment"] else ""
        return f'{above}SOURCE = "git+{address}"'

    return _SOURCE.sub(written, cell, count=1)


def main() -> None:
    """Runs the command."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("address", help="such as https://github.com/OWNER/NAME")
    set_address(ROOT, parser.parse_args().address)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
