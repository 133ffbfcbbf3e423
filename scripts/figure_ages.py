"""Which figures of README.md and docs/performance.md are older than what they measure.

    python scripts/figure_ages.py          # a line each; status 1 if there are any
    python scripts/figure_ages.py --write  # puts "not measured since commit …" there

A figure names its command and the commit that was measured (`commit 1234567`, or `noted
2026-01-31, 1234567`) in one table row, list entry or paragraph. The command says which
files it measures. Where those have changed behind that commit, the line must say so: it
names the first commit that changed them. A change of comments alone counts too. The
full history is needed, not a shallow clone.
"""

import argparse
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/performance.md")
_MEASURED = re.compile(
    r"(?<!since\s)\b(?:commit|noted\s+\d{4}-\d\d-\d\d,)\s+([0-9a-f]{7})\b"
)
_SAID = re.compile(r"not\s+measured\s+since")
_COMMAND = re.compile(
    r"python\s+-m\s+(?:(pallas_kernels)\.(?:benchmarks\.|tuning\s+)(\w+)"
    r"|((?:benchmarks|train)\.\w+))"
)
_SHARED = ("sparda_jax/inference", "sparda_jax/sparse", "sparda_jax/models")
_CPU = tuple(
    f"pallas_kernels/{op}/xla.py"
    for op in ("paged_decode_attention", "block_sparse_attention", "block_scores")
)


def _ops(*names: str) -> tuple[str, ...]:
    return tuple(f"pallas_kernels/{name}" for name in names)


_DECODE = _ops("paged_decode_attention", "choose_blocks", "plan_slots", "commit_blocks")
_PREFILL = _ops("block_sparse_attention", "block_scores", "choose_blocks")
# What a command measures, by its module; a kernel's own command measures its folder.
MEASURES = {
    "benchmarks.prefill": (*_SHARED, *_PREFILL),
    "benchmarks.prefill_attention": _ops("block_sparse_attention"),
    "benchmarks.all": (*_SHARED, *_PREFILL, *_DECODE),
    "benchmarks.offload": (*_SHARED, "sparda_jax/cache", *_DECODE),
    "benchmarks.best": (*_SHARED, "sparda_jax/cache", *_DECODE),
    "benchmarks.mesh": (
        *(*_SHARED, "sparda_jax/cache", *_DECODE),
        *("sparda_jax/engine/on_mesh.py", "sparda_jax/mesh.py"),
    ),
    "benchmarks.cpu": (*_SHARED, *_CPU),
    "benchmarks.host_routes": ("sparda_jax/cache/routes.py", *_ops("host_gather")),
    "benchmarks.layer_storage": ("benchmarks/layer_storage.py",),
    "train.benchmark": ("train", "sparda_jax/models"),
    "decode_account": _ops("paged_decode_attention"),
}


def units(text: str) -> Iterator[tuple[int, str]]:
    """Table rows, list entries and paragraphs of a page, with the line of each."""
    begun, lines = 0, list[str]()
    for number, line in enumerate([*text.splitlines(keepends=True), "\n"], 1):
        alone = line.startswith("|")
        if lines and (alone or not line.strip() or line.startswith(("- ", "* "))):
            yield begun, "".join(lines)
            lines = []
        if alone:
            yield number, line
        elif line.strip():
            begun = begun if lines else number
            lines.append(line)


def measured_paths(unit: str) -> tuple[str, ...]:
    """What the commands of a unit measure; nothing where none is known."""
    found: list[str] = []
    for package, op, module in _COMMAND.findall(unit):
        name = op or module
        found += MEASURES.get(name, _ops(name) if package else ())
    return tuple(dict.fromkeys(found))


def aged(
    text: str, changed: Callable[[str, tuple[str, ...]], str | None]
) -> tuple[str, list[str]]:
    """A page that says where its figures are old, and a line on each that did not.

    Args:
      text: The page.
      changed: The first commit behind one that changed any of some paths, or None.
    """
    silent, parts, done = list[str](), list[str](), 0
    for line, unit in units(text):
        paths = measured_paths(unit)
        place = text.index(unit, done)
        parts.append(text[done:place])
        done = place + len(unit)
        written, end = "", 0
        for match in _MEASURED.finditer(unit):
            closed = unit.find(")", match.end())
            said = _SAID.search(unit, match.end(), closed if closed >= 0 else len(unit))
            since = changed(match[1], paths) if paths and not said else None
            written += unit[end : match.end()]
            end = match.end()
            if since:
                silent.append(f"{line}: commit {match[1]}, changed in {since}")
                written += f"; not measured since commit {since}"
        parts.append(written + unit[end:])
    return "".join(parts) + text[done:], silent


def first_change(commit: str, paths: tuple[str, ...]) -> str | None:
    """The first commit behind `commit` that changed any of `paths`, or None."""
    command = ["git", "log", "--format=%h", "--abbrev=7", f"{commit}..HEAD", "--"]
    done = subprocess.run(
        [*command, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = done.stdout.split()
    return found[-1][:7] if found else None


def main() -> int:
    """Prints or writes the ages; the exit status is 1 if a figure was silent."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write them to the pages")
    write = parser.parse_args().write
    silent = 0
    for page in PAGES:
        path = ROOT / page
        text, lines = aged(path.read_text(encoding="utf-8"), first_change)
        for line in lines:
            print(f"{page}:{line}")
        silent += len(lines)
        if write:
            path.write_text(text, encoding="utf-8")
    print(f"{silent} figures are older than their code and do not say so")
    return int(silent > 0 and not write)


if __name__ == "__main__":
    sys.exit(main())
