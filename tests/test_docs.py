"""README and documentation: links, pictures, commands and examples hold."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import shlex
import xml.etree.ElementTree as ET

import pytest
from text_model import text_lm, text_tokenizer

import sparda_jax as sj
from sparda_jax.cli.main import build_parser

__all__ = ["text_lm", "text_tokenizer"]

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _blocks(name: str, *kinds: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(_text(name)) if kind in kinds]


def _slug(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_are_there(name):
    page = ROOT / name
    for target in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        assert not target.startswith("http:"), target
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(_slug, headings), f"{name}: {target}"


def _commands(name: str) -> list[list[str]]:
    found = []
    for body in _blocks(name, "sh", ""):
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("git "):
                line = line.split("| ", 1)[-1]
            if line.startswith(("sparda ", "make ", "python ")):
                found.append(shlex.split(line, comments=True))
    return found + [shlex.split(text) for text in _SPANS.findall(_text(name))]


_SPANS = re.compile(r"`((?:sparda [a-z]+|python -m [a-z]|python scripts/)[^`…]*)`")


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_known(name):
    """Every `sparda` line is parsed, and modules, scripts and targets exist."""
    targets = re.findall(r"^([a-z-]+):", _text("Makefile"), re.M)
    options = _all_options()
    for words in _commands(name):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[:2] == ["python", "-m"]:
            module = words[2].removesuffix(".<op>")
            assert importlib.util.find_spec(module) is not None, words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[1] in options, words
            for word in words[2:] if words[1] not in ("train", "bench") else []:
                if word.startswith("--"):
                    known = word.partition("=")[0] in options[words[1]]
                    assert known, f"{name}: {words}"


def _all_options() -> dict[str, set[str]]:
    for action in build_parser()._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            return {
                command: {o for a in parser._actions for o in a.option_strings}
                for command, parser in action.choices.items()
            }
    raise AssertionError("no commands")


def test_whole_commands_are_taken():
    """Those of the first page, with all that an option needs."""
    taken = 0
    for name in ("README.md", "docs/index.md", "docs/offload.md", "docs/budget.md"):
        for words in _commands(name):
            if words[0] == "sparda" and len(words) > 3 and "…" not in words:
                if not any(word.startswith(("<", ">", "|")) for word in words):
                    build_parser().parse_args(words[1:])
                    taken += 1
    assert taken >= 6


def test_the_readme_is_one_screen_and_its_commands_are_those_of_ci():
    text = _text("README.md")
    assert text.count("\n") < 70
    assert "make demo " in text and "make test " in text
    assert re.search(r"^make test$", _text(".ci/run"), re.M)


def test_pictures_are_seen_on_dark_pages_and_have_names():
    pictures = sorted((ROOT / "docs/figures").glob("*.svg"))
    assert len(pictures) >= 3
    shown = "".join(_text(name) for name in NAMES)
    for picture in pictures:
        tree = ET.parse(picture)
        assert tree.find("{http://www.w3.org/2000/svg}title") is not None
        assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8")
        assert f"figures/{picture.name}" in shown


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: sparda_jax\.(\w+)$", _text("docs/api.md"), re.M))
    assert listed == set(sj.__all__) - {"__version__", "PRESETS"}


EXAMPLES = [name for name in NAMES if _blocks(name, "python")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_python_with_names_that_exist(name):
    for body in _blocks(name, "python"):
        code = compile(body, name, "exec")
        used = re.findall(r"\bsj\.(\w+)", body)
        assert code is not None
        for word in used:
            assert hasattr(sj, word), f"{name}: sj.{word}"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, text_lm, monkeypatch, tmp_path):
    """On a tiny model that takes text, in the place of the one that they name."""
    if name == "CONTRIBUTING.md":
        pytest.skip("fragments")

    def load(model, *, attention="dense", forecast=None, cache=None):
        lm = sj.with_attention(text_lm, attention, forecast="from_query")
        return dataclasses.replace(lm, cache=cache or sj.CacheConfig())

    monkeypatch.setattr(sj, "load", load)
    monkeypatch.setattr(sj, "configure_offload", lambda: None)
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for body in _blocks(name, "python"):
        exec(compile(body, name, "exec"), space)
    assert os.listdir(tmp_path) == []
    assert "sj" in space


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config")
    settings = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build.build(settings)
    page = (tmp_path / "cli.html").read_text(encoding="utf-8")
    assert "--block-budget" in page and "sparda soak" in page
    errors = (tmp_path / "troubleshooting.html").read_text(encoding="utf-8")
    assert "Forecast" in errors and "is not allowed" in errors
