"""All figures of a card in one run, and the tables that are made of them.

    python -m benchmarks.all --card         # under nine minutes on one GPU
    python -m benchmarks.all --card --parts decode_36k prefill --out FOLDER
    python -m benchmarks.all --tables                # Markdown, of what was measured

Every part is a benchmark command with a limit. Whole prefill has a process of its own;
parts of decode share one, and kernels another, which starts JAX and pins memory once
for all of them (`benchmarks.one_process`). Results are written while a part runs,
whenever it has measured more: who ends the run keeps what there is. Each part leaves to
those behind it what their shortest forms need, so that a busy host costs long parts
their last cases and no part all of them. What does not fit into `--minutes` is left
out and said. What this card has no figures of comes first, then the oldest ones, so
that a second run measures what the first one left out.

Results are `<out>/<device>/<part>.json`: command, commit, device, JAX version, date,
exit status and the benchmark's own figures; by default they are those in
`benchmarks/results`, which the tables are made of. A card that was not at hand when a
part was last measured has lines of its own that say since which commit.
"""

import argparse
import dataclasses
import datetime
import itertools
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.one_process import Ended, Run, run_in_one_process, share
from benchmarks.parsers import benchmark_parser
from benchmarks.tables import tables
from pallas_kernels.device import device_slug
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import ConfigError, number
from sparda_jax.cli.ending import run_command

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
# Seconds that each may take, and that its first cases need on a busy host. Decode
# compiles 32 layers of every form at batch 1, and starts JAX.
_OPS = {
    "paged_decode_attention": (120, 50),
    "block_sparse_attention": (60, 40),
    "choose_blocks": (60, 15),
    "plan_slots": (60, 20),
    "block_scores": (60, 30),
    "host_gather": (60, 25),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One benchmark command.

    Attributes:
      name: Of its result.
      command: Module and arguments; "{json}" and "{folder}" are where it writes.
      seconds: Most that it may take.
      least: What its shortest form needs, which the parts before leave to it.
      process: Parts that stand side by side and name the same one share a process.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    least: int = 0
    process: str = ""

    def run_in(self, folder: pathlib.Path) -> Run:
        """The command, writing to a folder."""
        file = folder / f"{self.name.removeprefix('kernel_')}.json"
        where = {"json": file, "folder": folder, "seconds": "{seconds}"}
        words = [word.format(**where) for word in self.command]
        return Run(self.name, tuple(words), file, self.seconds, self.least)


def _decode(name: str, seconds: int, least: int, *arguments: str) -> Part:
    command = ("benchmarks.offload", *arguments, "--json", "{json}")
    return Part(name, command, seconds, least, "decode")


CARD = (
    Part(
        "prefill",
        (
            "benchmarks.prefill",
            *"--context 131072 --attention dense sparda infllm_v2".split(),
            *"--offloaded sparda --together --repeats 2 --enough 10".split(),
            *"--json {json}".split(),
        ),
        270,
        150,
    ),
    # What the first one pins serves the second.
    _decode(
        *("decode_128k", 150, 80),
        *"--context 131072 --batch 8 --slots 1 3 --steps 48".split(),
    ),
    # The default trace's lists go through more blocks than 32k tokens have.
    _decode(
        *("decode_36k", 90, 50),
        *"--context 36864 --batch 16 --slots 1 --steps 48".split(),
    ),
    *(
        Part(
            f"kernel_{op}",
            (
                f"pallas_kernels.benchmarks.{op}",
                *("--out", "{folder}", "--seconds", "{seconds}"),
            ),
            most,
            least,
            "kernels",
        )
        for op, (most, least) in _OPS.items()
    ),
)


def commit_here() -> str:
    """The commit of this checkout, "-dirty" behind it if files differ; or unknown."""
    folder = pathlib.Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device() -> tuple[str, str, str]:
    """Kind, platform and JAX version, asked in a process that then lets go of it."""
    script = "import jax; d = jax.devices()[0]; print(d.device_kind, d.platform, "
    script += "jax.__version__, sep=chr(10))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"JAX finds no device: {done.stderr.strip()[-300:]}")
    kind, platform, version = done.stdout.splitlines()[-3:]
    return kind, platform, version


def _by_hand(command: Iterable[str]) -> list[str]:
    """A part's command for who runs it alone: without the time that it may take."""
    return [word for word in command if word not in ("--seconds", "{seconds}")]


def _result(part: Part, run: Run, ended: Ended) -> dict[str, Any]:
    """A part's result, whole or as far as it came."""
    return {
        "part": part.name,
        "command": "python -m " + " ".join(_by_hand(part.command)),
        "status": ended.status,
        "seconds": round(ended.seconds, 1),
        "figures": read_json(run.file) or {},
        "end": ended.printed[-1500:] if ended.status != 0 else "",
    }


def run_card(
    parts: tuple[Part, ...], out: pathlib.Path, minutes: float, commit: str
) -> list[str]:
    """Runs parts until the time is up; returns a line on each that has no result.

    Args:
      parts: What to run; what was never measured first, then by age.
      out: Folder of results.
      minutes: All that may be taken.
      commit: Of the code, for the results.
    """
    end = time.monotonic() + 60 * minutes
    kind, platform, version = _device()
    if platform == "cpu":
        print("no GPU is at hand: these are figures of a CPU", flush=True)
    folder = out / device_slug(kind)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"device": kind, "jax": version, "commit": commit}

    def keep(part: Part, run: Run, ended: Ended) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = head | {"date": date} | _result(part, run, ended)
        if result["figures"]:
            write_json(folder / f"{part.name}.json", result)

    missing = []
    ordered = sorted(parts, key=lambda part: _last_measured(folder, part))
    behind = sum(part.least for part in ordered)
    for _, group in itertools.groupby(ordered, lambda part: part.process or part.name):
        together = list(group)
        needed = sum(part.least for part in together)
        behind -= needed
        left = share(end - time.monotonic(), math.inf, needed, behind)
        names = ", ".join(part.name for part in together)
        print(f"== {names}: {left:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as written:
            missing += _run_group(together, pathlib.Path(written), left, keep)
    return missing


def _run_group(
    parts: list[Part],
    folder: pathlib.Path,
    seconds: float,
    keep: Callable[[Part, Run, Ended], None],
) -> list[str]:
    """Runs the parts of one process; returns a line on each that has no result."""
    runs = {part.name: part.run_in(folder) for part in parts}
    by_name = {part.name: part for part in parts}

    def kept(ended: Ended) -> None:
        keep(by_name[ended.name], runs[ended.name], ended)

    missing = dict.fromkeys(runs, "is left out: the time is up")
    # Less is no time for anything.
    seconds = seconds if seconds >= 10 else 0.0
    for ended in run_in_one_process(list(runs.values()), seconds, kept):
        kept(ended)
        took = f"{ended.name}: status {ended.status} after {ended.seconds:.0f} s"
        print(f"== {took}", flush=True)
        missing[ended.name] = f"has no figures: status {ended.status}"
        if figures := read_json(runs[ended.name].file):
            del missing[ended.name]
            if left_out := figures.get("left_out"):
                missing[ended.name] = f"lacks {', '.join(left_out)}"
    return [f"{name} {why}" for name, why in missing.items()]


def _last_measured(folder: pathlib.Path, part: Part) -> str:
    """When a part was last measured whole, as text in the order of time; or ""."""
    found = read_json(folder / f"{part.name}.json")
    if not isinstance(found, dict) or found.get("status") != 0:
        return ""
    if found.get("figures", {}).get("left_out"):
        return ""
    return str(found.get("date", ""))


def results(folder: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """All results in a folder.

    Raises:
      CheckpointError: If a file is damaged.
    """
    for path in sorted(folder.glob("*/*.json")):
        found = read_json(path)
        if found is not None and "figures" in found:
            yield found


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("all", __doc__)
    parser.add_argument("--card", action="store_true", help="measure this card")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in CARD], help="only these"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=8.8, help="all that it takes")
    parser.add_argument("--commit", help="of the code, where there is no git")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    minutes = number(above=0)("--minutes", arguments.minutes)
    if not (arguments.card or arguments.tables):
        raise ConfigError("nothing is asked for: --card, --tables or both")
    missing: list[str] = []
    if arguments.card:
        wanted = arguments.parts or [part.name for part in CARD]
        parts = tuple(part for part in CARD if part.name in wanted)
        commit = arguments.commit or commit_here()
        missing = run_card(parts, arguments.out, minutes, commit)
    if arguments.tables:
        print(tables(list(results(arguments.out))))
    if missing:
        raise ConfigError(f"not all was measured: {'; '.join(missing)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
