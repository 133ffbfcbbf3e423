"""All figures of a card in one run, and the tables that are made of them.

    python -m benchmarks.all --card         # under nine minutes on one GPU
    python -m benchmarks.all --card --parts decode_36k prefill --out FOLDER
    python -m benchmarks.all --tables                # Markdown, of what was measured

Every part is a benchmark command in a process of its own, with a limit; what a part has
measured when its time is up is kept, and what does not fit into `--minutes` is left out
and said. What this card has no figures of comes first, then the oldest ones: where
nothing is compiled yet all parts have not been seen to fit (whole prefill alone took
194 s of an H200), so that a second run measures what the first one left out.
Results are `<out>/<device>/<part>.json`: command, commit, device, JAX version, date,
exit status and the benchmark's own figures; by default they are those in
`benchmarks/results`, which the tables are made of. A card that was not at hand when a
part was last measured has lines of its own that say since which commit.
"""

import argparse
import dataclasses
import datetime
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.parsers import benchmark_parser
from benchmarks.tables import tables
from pallas_kernels.device import device_slug
from sparda_jax.checkpoint.atomic import write_json
from sparda_jax.checkpoint.files import read_json
from sparda_jax.checks import ConfigError, number
from sparda_jax.cli.ending import run_command

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_OPS = (
    "paged_decode_attention",
    "block_sparse_attention",
    "choose_blocks",
    "plan_slots",
    "block_scores",
    "host_gather",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One benchmark command.

    Attributes:
      name: Of its result.
      command: Module and arguments; "{json}" and "{folder}" are where it writes.
      seconds: Most that it may take.
    """

    name: str
    command: tuple[str, ...]
    seconds: int

    def files(self, folder: pathlib.Path) -> tuple[list[str], pathlib.Path]:
        """The command line, and the file that the benchmark writes."""
        file = folder / f"{self.name.removeprefix('kernel_')}.json"
        words = [word.format(json=file, folder=folder) for word in self.command]
        return [sys.executable, "-u", "-m", *words], file


def _decode(name: str, seconds: int, *arguments: str) -> Part:
    command = ("benchmarks.offload", *arguments, "--json", "{json}")
    return Part(name, command, seconds)


CARD = (
    Part(
        "prefill",
        (
            "benchmarks.prefill",
            *"--context 131072 --attention dense sparda infllm_v2".split(),
            *"--offloaded sparda --together --repeats 2 --json {json}".split(),
        ),
        240,
    ),
    # The default trace's lists go through more blocks than 32k tokens have.
    _decode(
        "decode_36k", 90, *"--context 36864 --batch 16 --slots 1 --steps 48".split()
    ),
    _decode(
        "decode_128k", 140, *"--context 131072 --batch 8 --slots 1 3 --steps 48".split()
    ),
    *(
        Part(
            f"kernel_{op}", (f"pallas_kernels.benchmarks.{op}", "--out", "{folder}"), 60
        )
        for op in _OPS
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


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part and returns its result, whole or as far as it came.

    Args:
      part: What to run.
      seconds: When it is ended, if that comes before its own limit.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command, file = part.files(pathlib.Path(folder))
        status: int | None = None
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=min(seconds, part.seconds),
                check=False,
            )
            status, printed = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
        text = printed.decode("utf-8", "replace")
        print(text, flush=True)
        return {
            "part": part.name,
            "command": "python -m " + " ".join(part.command),
            "status": status,
            "seconds": round(time.monotonic() - begun, 1),
            "figures": read_json(file) or {},
            "end": text[-1500:] if status != 0 else "",
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
    missing = []
    folder = out / device_slug(kind)
    for part in sorted(parts, key=lambda part: _last_measured(folder, part)):
        left = end - time.monotonic()
        if left < 10:
            missing.append(f"{part.name} is left out: the time is up")
            continue
        print(f"== {part.name}, {left:.0f} s left", flush=True)
        result = run_part(part, left)
        if not result["figures"]:
            missing.append(f"{part.name} has no figures: status {result['status']}")
            continue
        head = {
            "device": kind,
            "jax": version,
            "commit": commit,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{part.name}.json", head | result)
    return missing


def _last_measured(folder: pathlib.Path, part: Part) -> str:
    """When a part was last measured whole, as text in the order of time; or ""."""
    found = read_json(folder / f"{part.name}.json")
    if not isinstance(found, dict) or found.get("status") != 0:
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
