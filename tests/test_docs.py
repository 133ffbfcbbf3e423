"""README and documentation: links, pictures, commands and examples hold."""

import dataclasses
import doctest
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from doc_pages import BLOCK, NAMES, ROOT, all_options, blocks, page_text
from text_model import text_lm, text_tokenizer

import sparda_jax as sj

__all__ = ["text_lm", "text_tokenizer"]

_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _slug(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_are_there(name):
    page = ROOT / name
    for target in _LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        assert not target.startswith("http:"), target
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(_slug, headings), f"{name}: {target}"


def test_what_the_code_cites_is_there():
    """Pages of the documentation, and sections of the page with the formulas."""
    text = page_text("docs/algorithm.md")
    sections = set(re.findall(r"^###? (\d+(?:\.\d+)?)\.? ", text, re.M))
    cited = set()
    for folder in ("pallas_kernels", "sparda_jax", "train", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            code = path.read_text(encoding="utf-8")
            for page in re.findall(r"\bdocs/[\w-]+\.md", code):
                assert (ROOT / page).exists(), f"{path}: {page}"
            if "docs/algorithm.md" in code:
                for section in re.findall(r"§(\d+(?:\.\d+)?)", code):
                    assert section in sections, f"{path}: §{section}"
                    cited.add(section)
    assert {"2.4", "4.3", "5.5", "7.2"} <= cited


def test_the_readme_is_one_screen_and_its_commands_are_those_of_ci():
    text = page_text("README.md")
    assert text.count("\n") < 70
    assert "make demo " in text and "make test " in text
    assert re.search(r"^make test$", page_text(".ci/run"), re.M)


def test_pictures_are_seen_on_dark_pages_and_have_names():
    pictures = sorted((ROOT / "docs/figures").glob("*.svg"))
    assert len(pictures) >= 3
    shown = "".join(page_text(name) for name in NAMES)
    for picture in pictures:
        tree = ET.parse(picture)
        assert tree.find("{http://www.w3.org/2000/svg}title") is not None
        assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8")
        assert f"figures/{picture.name}" in shown


def test_every_page_is_in_the_menu():
    listed = re.findall(r": ([\w/-]+\.md)$", page_text("mkdocs.yml"), re.M)
    pages = (ROOT / "docs").rglob("*.md")
    there = {path.relative_to(ROOT / "docs").as_posix() for path in pages}
    assert sorted(listed) == sorted(there)


def test_the_figures_are_those_that_the_script_draws(tmp_path):
    command = [sys.executable, "scripts/draw_figures.py", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=_ENVIRONMENT, check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == ["lists.svg", "misses.svg", "recall.svg"]
    for path in drawn:
        assert path.read_text() == page_text(f"docs/figures/{path.name}")


@pytest.mark.slow
def test_the_script_of_determinism_ends_well():
    command = [sys.executable, "scripts/check_determinism.py", "--model", "tiny"]
    done = subprocess.run(
        command, cwd=ROOT, env=_ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: sparda_jax\.(\w+)$", page_text("docs/api.md"), re.M))
    assert listed == set(sj.__all__) - {"__version__", "PRESETS"}


EXAMPLES = [name for name in NAMES if blocks(name, "python")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_python_with_names_that_exist(name):
    for body in blocks(name, "python"):
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
    for body in blocks(name, "python"):
        exec(compile(body, name, "exec"), space)
    assert os.listdir(tmp_path) == []
    # What the trainer's page configures needs nothing of the package itself.
    assert "sj" in space or "DataConfig" in space


@pytest.mark.slow
def test_examples_of_docstrings_run(text_lm):
    """Of all public names and their methods; `lm` is a tiny model that takes text."""
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(optionflags=flags)
    found = []
    for name in sj.__all__:
        value = getattr(sj, name)
        members = vars(value).items() if inspect.isclass(value) else ()
        methods = {f"{name}.{key}": member for key, member in members}
        for place, documented in {name: value, **methods}.items():
            text = getattr(documented, "__doc__", None) or ""
            if ">>> " in text:
                space = {"sj": sj, "lm": text_lm}
                parsed = doctest.DocTestParser().get_doctest(text, space, place, "", 0)
                told: list[str] = []
                runner.run(parsed, out=told.append)
                assert not told, "".join(told)
                found.append(place)
    assert {"load", "generate", "stream", "chat", "plan", "Conversation.fork"} <= set(
        found
    )


def test_every_command_has_its_options_in_the_reference(hooks):
    tables = hooks.option_tables()
    parts = dict(
        re.findall(r"^## sparda ([\w-]+)\n(.*?)(?=^## |\Z)", tables, re.M | re.S)
    )
    assert parts.keys() == all_options().keys()
    assert "`--compare`" in parts["bench"] and "`--config`" in parts["train"]
    assert "`--minutes`" in parts["soak"]
    assert "None" not in tables and "==SUPPRESS==" not in tables


def test_a_figure_older_than_its_code_is_found():
    ages = _script("figure_ages")
    page = (
        "| 9 ms: `python -m pallas_kernels.tuning plan_slots` (commit aaaaaaa) | |\n"
        "| 8 ms: `python -m pallas_kernels.tuning plan_slots` (commit ccccccc) | |\n"
        "| 7 ms: `python -m pallas_kernels.tuning host_gather` (commit aaaaaaa) | |\n\n"
        "`python -m benchmarks.prefill` takes 2 s (noted 2026-01-31, aaaaaaa; not\n"
        "measured since commit bbbbbbb) and took\n3 s (commit ccccccc). Of\n"
        "no command is\n\nthis: commit aaaaaaa\n"
    )
    asked = []

    def changed(commit, paths):
        asked.append((commit, paths))
        return None if "pallas_kernels/host_gather" in paths else "ddddddd"

    text, silent = ages.aged(page, changed)
    since = "; not measured since commit ddddddd"
    first, _, third = page.splitlines()[:3]
    assert text.splitlines()[0] == first.replace(
        "(commit aaaaaaa", f"(commit aaaaaaa{since}"
    )
    assert text.splitlines()[2] == third
    assert f"3 s (commit ccccccc{since})" in text and "bbbbbbb) and" in text
    assert text.endswith("this: commit aaaaaaa\n")
    assert [line.split(":")[0] for line in silent] == ["1", "2", "5"]
    assert "sparda_jax/inference" in dict(asked)["ccccccc"]
    assert ages.aged(text, changed) == (text, [])
    for paths in ages.MEASURES.values():
        assert all((ROOT / path).exists() for path in paths)


@pytest.fixture
def hooks():
    """`scripts/docs_hooks.py` as a module of its own."""
    return _script("docs_hooks")


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_notebook_page_has_what_its_cells_gave(hooks, tmp_path, monkeypatch):
    """Kept outputs go before those of this machine; a changed cell shows nothing."""

    def cell(source, *outputs):
        return {"cell_type": "code", "source": source, "outputs": list(outputs)}

    def write(name, value):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(value), encoding="utf-8")

    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    words = {"cell_type": "markdown", "source": ["# Title\n", "Words"]}
    write("notebooks/x.ipynb", {"cells": [words, cell("a()"), cell("new()")]})
    page = hooks.notebook("x")
    assert "Without outputs" in page and "Words" in page and "# Title" not in page
    assert "[Download x.ipynb](x.ipynb)" in page and "/#upload=true)" in page
    stream = {"name": "stdout", "text": ["here\n", "too\n"]}
    error = {"name": "stderr", "text": ["not this"]}
    ran = {"cells": [words, cell("a()", stream, error)]}
    write("build/notebooks/x.ipynb", ran)
    page = hooks.notebook("x")
    assert "```text\nhere\ntoo\n```" in page and "not this" not in page
    kept = [
        {"source": "a()", "outputs": [{"text": "card\n"}, {"png": "AAAA"}]},
        {"source": "old()", "outputs": [{"text": "stale\n"}]},
    ]
    made = {"date": "2026-11-26", "commit": "abc1234"}
    write("notebooks/outputs/x.json", made | {"cells": kept})
    page = hooks.notebook("x", "https://github.com/some/where")
    assert "```text\ncard\n```" in page and "base64,AAAA" in page
    assert "here" not in page.replace("where", "") and "stale" not in page
    assert "2026-11-26, commit abc1234" in page
    assert "/github/some/where/blob/main/notebooks/x.ipynb)" in page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"cells": [', "is no valid JSON: .* line 1 column 12"),
        ('{"date": ""}', "has no 'cells'"),
        ('{"cells": [7]}', "'cells' must be a list of objects"),
        ('{"cells": [{"outputs": []}]}', "cell 0 has no 'source'"),
        ('{"cells": [{"source": ""}]}', "cell 0 has no 'cell_type'"),
        ('{"cells": [{"source": 7, "cell_type": "code"}]}', "'source' must be text"),
        ('{"cells": [{"source": [7], "cell_type": "code"}]}', "'source' must be text"),
        ('{"cells": []}', "has no cell$"),
        ("", "is no valid JSON"),
        ("3", "holds 3, wanted a JSON object"),
    ],
)
def test_a_damaged_notebook_is_told_in_a_line(hooks, text, told, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/x.ipynb").write_text(text, encoding="utf-8")
    with pytest.raises(sj.CheckpointError, match=rf"x.ipynb: .*{told}"):
        hooks.notebook("x")


def test_what_a_notebook_gave_has_texts_by_which_cells_find_it(hooks, tmp_path):
    kept = {"date": "", "commit": "", "cells": [{"source": ["1"], "outputs": []}]}
    (tmp_path / "x.json").write_text(json.dumps(kept))
    with pytest.raises(sj.CheckpointError, match=r"cell 0: 'source' must be one text"):
        hooks.read_kept(tmp_path / "x.json")


def test_an_address_is_said_once(hooks, tmp_path, monkeypatch):
    """Badges in all notebooks and pages, what Colab installs, and outputs stay."""
    monkeypatch.setitem(sys.modules, "docs_hooks", hooks)
    setter = _script("set_address")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    with pytest.raises(sj.ConfigError, match="OWNER/NAME"):
        setter.set_address(tmp_path, "https://example.org/a/b")
    for address in ("https://github.com/first/one.git", "https://github.com/some/fork"):
        setter.set_address(tmp_path, address)
    settings = (tmp_path / "mkdocs.yml").read_text("utf-8")
    assert re.findall("^repo_url: (.*)$", settings, re.M) == [address]
    books = sorted((tmp_path / "notebooks").glob("*.ipynb"))
    assert len(books) == 6
    for book in books:
        link = f"/github/some/fork/blob/main/notebooks/{book.name})"
        before = json.loads((ROOT / "notebooks" / book.name).read_text("utf-8"))
        cells = json.loads(book.read_text("utf-8"))["cells"]
        title, first = ("".join(cell["source"]) for cell in cells[:2])
        assert title.count("colab-badge.svg") == title.count(link) == 1
        assert title.startswith("".join(before["cells"][0]["source"]).splitlines()[0])
        assert f'\nSOURCE = "git+{address}"\n' in first
        assert first.count("SOURCE = ") == first.count("# A wheel, a folder") == 1
        assert cells[2:] == before["cells"][2:]
        page = hooks.notebook(book.stem, address)
        assert page.count("colab-badge.svg") == page.count(link) == 1
        assert page.count("```text") == hooks.notebook(book.stem).count("```text") > 0


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ([], "has no cell$"),
        ([{"cell_type": "markdown", "source": []}], "must begin with a title"),
        ([{"cell_type": "code", "source": "# 1"}], "must begin with a title"),
        ([{"cell_type": "markdown", "source": "# Title"}], "has no cell of code"),
    ],
)
def test_an_empty_notebook_gets_no_address(hooks, cells, told, tmp_path, monkeypatch):
    """One line says what lacks, and nothing is written."""
    monkeypatch.setitem(sys.modules, "docs_hooks", hooks)
    setter = _script("set_address")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/link.ipynb", tmp_path / "notebooks/a.ipynb")
    (tmp_path / "notebooks/x.ipynb").write_text(json.dumps({"cells": cells}))
    before = {path: path.read_text("utf-8") for path in tmp_path.rglob("*.*")}
    with pytest.raises(sj.CheckpointError, match=rf"x.ipynb: {told}"):
        setter.set_address(tmp_path, "https://github.com/some/fork")
    assert before == {path: path.read_text("utf-8") for path in before}


@pytest.mark.slow
@pytest.mark.long  # `make docs`, which .ci/run ends with, does the same
def test_the_site_builds_without_warnings(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config")
    settings = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build.build(settings)
    page = (tmp_path / "cli.html").read_text(encoding="utf-8")
    assert "--block-budget" in page and "sparda soak" in page
    errors = (tmp_path / "troubleshooting.html").read_text(encoding="utf-8")
    assert "Forecast" in errors and "is not allowed" in errors
    link = (tmp_path / "notebooks/link.html").read_text(encoding="utf-8")
    assert 'href="link.ipynb"' in link and "sparda_jax" in link
    assert json.loads((tmp_path / "notebooks/link.ipynb").read_text("utf-8"))["cells"]


@pytest.mark.slow
def test_results_are_what_their_files_say():
    page_maker = _script("results_page")
    folder = ROOT / "docs/results"
    pages = [ROOT / "docs/results.md", *sorted(folder.glob("*.md"))]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    assert max(text.count("\n") for text in texts) <= 500
    marks = re.findall(r"<!-- results: (\S+) (\d+) -->", "".join(texts))
    held = [
        (path.stem, str(length))
        for path in sorted(folder.glob("*.json"))
        for length in json.loads(path.read_text("utf-8"))["settings"]["lengths"]
    ]
    assert sorted(marks) == sorted(held)
    assert texts[0].count("<!-- overview -->") == 1
    for text in texts:
        # Another number in a page is seen.
        other = text.replace("| dense | 100 [", "| dense | 99 [")
        other = other.replace("| `dense` | 98.2", "| `dense` | 98.3")
        assert page_maker.filled(other) == text
