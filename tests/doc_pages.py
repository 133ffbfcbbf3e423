"""Pages of the documentation, their blocks and the commands that they show."""

import pathlib
import re
import shlex
import textwrap

from sparda_jax.cli.main import build_parser

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# An indented block belongs to an item of a list.
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
# Lines are broken anywhere.
_SPANS = re.compile(
    r"`((?:sparda\s+[a-z]+|python\s+-m\s+[a-z]|python\s+scripts/)[^`…]*)`"
)


def page_text(name: str) -> str:
    """A page, by its path in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, *kinds: str) -> list[str]:
    """Fenced blocks of a page, of these languages."""
    found = BLOCK.findall(page_text(name))
    return [textwrap.dedent(body) for _, kind, body in found if kind in kinds]


def commands(name: str) -> list[list[str]]:
    """Commands of ours that a page shows, in blocks first and then in its lines."""
    found = []
    for body in blocks(name, "sh", ""):
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("git "):
                line = line.split("| ", 1)[-1]
            if line.startswith(("sparda ", "make ", "python ")):
                found.append(shlex.split(line, comments=True))
    return found + [shlex.split(text) for text in _SPANS.findall(page_text(name))]


def all_options() -> dict[str, set[str]]:
    """The options of every `sparda` command."""
    for action in build_parser()._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            return {
                command: {o for a in parser._actions for o in a.option_strings}
                for command, parser in action.choices.items()
            }
    raise AssertionError("no commands")
