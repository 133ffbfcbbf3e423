"""What the documentation takes from the code when `mkdocs build` makes it.

`<!-- options -->` in a page becomes the option tables of all commands,
`<!-- errors -->` the errors that the code raises, `<!-- file: NAME -->` the contents
of a file, `<!-- notebook: NAME -->` a notebook: with its outputs where `make notebooks`
has left it in build/notebooks, else without.
"""

import argparse
import ast
import json
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
_MARK = re.compile(r"<!-- (options|errors|file: (\S+)|notebook: (\S+)) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fills the marks of a page; called by mkdocs."""

    def fill(mark: re.Match) -> str:
        if mark[2]:
            return _included(mark[2])
        if mark[3]:
            return notebook(mark[3])
        return option_tables() if mark[1] == "options" else error_table()

    return _MARK.sub(fill, markdown)


def _included(name: str) -> str:
    """A file of the repository, without its first heading."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\A# .*\n", "", text)


def notebook(name: str) -> str:
    """A notebook as Markdown: words, code, and what it printed and drew if it ran."""
    source = ROOT / "notebooks" / f"{name}.ipynb"
    executed = ROOT / "build" / "notebooks" / source.name
    place = executed if executed.exists() else source
    parts = []
    for cell in json.loads(place.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    return re.sub(r"\A# .*\n", "", "\n\n".join(parts))


def _output(output: dict) -> str:
    """What a cell printed, or drew; nothing of what it said on standard error."""
    if output.get("name") == "stdout":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    picture = output.get("data", {}).get("image/png")
    if picture is None:
        return ""
    data = "".join(picture).replace("\n", "")
    return f'<img alt="what the cell above drew" src="data:image/png;base64,{data}">'


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def option_tables() -> str:
    """A table a command, from its parser."""
    from sparda_jax.cli.main import build_parser

    parts = []
    for action in build_parser()._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        about = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, parser in action.choices.items():
            parts.append(f"## sparda {name}\n\n{about.get(name, '')}\n")
            rows = list(_rows(parser))
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
        default = action.default
        shown = "" if default in (None, False, "", []) else f"`{default}`"
        if action.required:
            shown = "required"
        label = f"{names} {_cell(str(value))}".strip()
        yield f"| {label} | {shown} | {_cell(action.help or '')} |"


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
