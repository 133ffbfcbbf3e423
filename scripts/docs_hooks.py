"""What the documentation takes from the code when `mkdocs build` makes it.

`<!-- options -->` in a page becomes the option tables of all commands,
`<!-- errors -->` the errors that the code raises, `<!-- file: NAME -->` the contents
of a file, `<!-- notebook: NAME -->` a notebook with what its cells gave: as
`notebooks/outputs` has it, else where `make notebooks` has left it in build/notebooks.
A cell that has changed since shows nothing.

With a `repo_url` of GitHub in mkdocs.yml a notebook's page has a badge that opens it in
Colab; without one it links the notebook, which is a file of the site, and the page of
Colab that takes it.
"""

import argparse
import ast
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.files import read_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
_MARK = re.compile(r"<!-- (options|errors|file: (\S+)|notebook: (\S+)) -->")


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the notebooks to the site, so that pages can link them."""
    from mkdocs.structure.files import File

    for book in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = f"notebooks/{book.name}"
        files.append(File.generated(config, name, abs_src_path=str(book)))
    return files


def on_page_markdown(
    markdown: str, *, config: Mapping[str, Any] | None = None, **_: object
) -> str:
    """Fills the marks of a page; called by mkdocs."""
    address = (config or {}).get("repo_url") or ""

    def fill(mark: re.Match) -> str:
        if mark[2]:
            return _included(mark[2])
        if mark[3]:
            return notebook(mark[3], address)
        return option_tables() if mark[1] == "options" else error_table()

    return _MARK.sub(fill, markdown)


def _included(name: str) -> str:
    """A file of the repository, without its first heading."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\A# .*\n", "", text)


def notebook(name: str, address: str = "") -> str:
    """A notebook as Markdown: how to open it, words, code, what it printed and drew.

    Args:
      name: Of the file in `notebooks`, without its end.
      address: The repository's public address; "" for none.
    """
    source = ROOT / "notebooks" / f"{name}.ipynb"
    cells = read_cells(source)["cells"]
    where, given = _outputs(name)
    parts = [_opened(source.name, address), f"*{where}*"]
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines = re.sub(r"\A# .*\n", "", text).splitlines()
            parts.append("\n".join(line for line in lines if not is_badge(line)))
            continue
        parts.append(f"```python\n{text}\n```")
        parts += map(_shown, given.get(text, []))
    return "\n\n".join(parts)


_GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?")
_COLAB = "https://colab.research.google.com"
_BADGE = f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]"


def colab_badge(address: str, file: str) -> str | None:
    """A badge that opens a notebook in Colab; None if `address` is not GitHub's."""
    place = _GITHUB.fullmatch(address)
    if place is None:
        return None
    return f"{_BADGE}({_COLAB}/github/{place[1]}/blob/main/notebooks/{file})"


def is_badge(line: str) -> bool:
    """Whether a line of a notebook is a badge of `colab_badge`."""
    return line.startswith(_BADGE)


_OF_CELLS = ("source", "cell_type")


def read_cells(
    file: pathlib.Path, *needed: str, of_cells: tuple[str, ...] = _OF_CELLS
) -> dict[str, Any]:
    """A notebook, or what its cells gave.

    Args:
      file: That has it, as JSON.
      needed: What must stand there beside the cells.
      of_cells: What each cell must have.

    Raises:
      CheckpointError: If the file is damaged, or there are no cells.
    """
    value = read_json(file)
    if value is None:
        raise CheckpointError(f"{file}: is missing")
    for name in ("cells", *needed):
        if name not in value:
            raise CheckpointError(f"{file}: has no {name!r}")
    cells = value["cells"]
    if not isinstance(cells, list) or not all(isinstance(c, dict) for c in cells):
        raise CheckpointError(f"{file}: 'cells' must be a list of objects")
    if not cells:
        raise CheckpointError(f"{file}: has no cell")
    for number, cell in enumerate(cells):
        for name in of_cells:
            if name not in cell:
                raise CheckpointError(f"{file}: cell {number} has no {name!r}")
        if not _is_text(cell["source"]):
            raise CheckpointError(f"{file}: cell {number}: 'source' must be text")
    return value


def _is_text(source: Any) -> bool:
    """Whether a cell's source is a text, or a list of its lines."""
    lines = [source] if isinstance(source, str) else source
    return isinstance(lines, list) and all(isinstance(line, str) for line in lines)


def read_kept(file: pathlib.Path) -> dict[str, Any]:
    """What a notebook's cells gave where it ran last, as `notebooks/outputs` has it.

    Raises:
      CheckpointError: If the file is damaged, or there are no cells.
    """
    run = read_cells(file, "date", "commit", of_cells=("source", "outputs"))
    for number, cell in enumerate(run["cells"]):
        if not isinstance(cell["source"], str):
            raise CheckpointError(f"{file}: cell {number}: 'source' must be one text")
    return run


def _opened(file: str, address: str) -> str:
    """A badge that opens a notebook in Colab, or how to open it there."""
    badge = colab_badge(address, file)
    if badge is not None:
        return f"{badge} [`notebooks/{file}`]({file})"
    button = "{ .md-button }"
    return (
        f"[Download {file}]({file}){button} "
        f"[Colab, to upload it to]({_COLAB}/#upload=true){button}\n\n"
        "Colab also needs the package: [how](../notebooks.md#in-colab)."
    )


def _outputs(name: str) -> tuple[str, dict[str, list[dict[str, str]]]]:
    """Where a notebook ran, and what each code cell gave, by its text."""
    kept = ROOT / "notebooks" / "outputs" / f"{name}.json"
    executed = ROOT / "build" / "notebooks" / f"{name}.ipynb"
    if kept.exists():
        run = read_kept(kept)
        where = f"Outputs of {run['date']}, commit {run['commit']}; the first cell's"
        given = {cell["source"]: cell["outputs"] for cell in run["cells"]}
        return f"{where} say the device.", given
    if executed.exists():
        cells = read_cells(executed)["cells"]
        given = {
            "".join(cell["source"]): [
                got for out in cell.get("outputs", ()) if (got := _given(out))
            ]
            for cell in cells
            if cell["cell_type"] == "code"
        }
        return "Outputs of `make notebooks` where this site was built.", given
    return "Without outputs: `make notebooks` had not run where this was built.", {}


def _given(output: dict) -> dict[str, str] | None:
    """What a cell printed, or drew; nothing of what it said on standard error."""
    if output.get("name") == "stdout":
        return {"text": "".join(output["text"])}
    picture = output.get("data", {}).get("image/png")
    return None if picture is None else {"png": "".join("".join(picture).split())}


def _shown(output: dict[str, str]) -> str:
    if "text" in output:
        return f"```text\n{output['text'].rstrip()}\n```"
    data = output["png"]
    return f'<img alt="what the cell above drew" src="data:image/png;base64,{data}">'


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def option_tables() -> str:
    """A table a command, from its parser."""
    from benchmarks import bench
    from sparda_jax.cli.main import build_parser
    from train import adapt_command, options

    above = {
        "adapt": adapt_command.build_parser,
        "bench": bench.build_parser,
        "train": options.build_parser,
    }
    parts = []
    for action in build_parser()._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        about = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, parser in action.choices.items():
            parts.append(f"## sparda {name}\n\n{about.get(name, '')}\n")
            # Commands of other packages have parsers of their own.
            rows = list(_rows(above[name]() if name in above else parser))
            if rows:
                parts.append(
                    "| option | default | |\n|---|---|---|\n" + "\n".join(rows)
                )
            parts.append("")
    return "\n".join(parts)


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        value = action.metavar or ("" if action.nargs == 0 else action.dest)
        value = " ".join(value) if isinstance(value, tuple) else value
        default = action.default
        default = ",".join(map(str, default)) if isinstance(default, list) else default
        shown = "" if default in (None, False, "") else f"`{default}`"
        if action.required and action.nargs not in ("?", "*"):
            shown = "required"
        label = f"{names} {_cell(value)}".strip()
        told = (action.help or "").replace("%%", "%")
        yield f"| {label} | {shown} | {_cell(told)} |"


_RAISED = ("ConfigError", "CheckpointError")


def errors() -> Iterator[tuple[str, str, str]]:
    """(module, error, message) of all errors that are raised with a text of their own.

    What an expression stands for is shown as its source in braces.
    """
    for path in sorted((ROOT / "sparda_jax").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in _RAISED and node.args:
                message = _message(node.args[0])
                if message is not None and len(message) > 12:
                    yield module, node.func.id, message
            elif node.func.id == "require" and len(node.args) == 4:
                field, allowed = _message(node.args[1]), _message(node.args[3])
                if field is not None and allowed is not None:
                    text = f"{field}=… is not allowed: it must be {allowed}"
                    yield module, "ConfigError", text


def _message(node: ast.expr) -> str | None:
    """The text of a literal or of an f-string; None for all else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value)
            if isinstance(part, ast.Constant)
            else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    return None


def error_table() -> str:
    """The errors by the part of the package that raises them."""
    parts: dict[str, list[str]] = {}
    for module, kind, message in errors():
        # In a code span braces and stars are what they are.
        shown = " ".join(message.split()).replace("`", "'").replace("|", "\\|")
        parts.setdefault(module, []).append(f"| `{shown}` | {kind} |")
    return "\n\n".join(
        f"## {module}\n\n| message | |\n|---|---|\n" + "\n".join(dict.fromkeys(rows))
        for module, rows in parts.items()
    )
