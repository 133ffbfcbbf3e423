"""`sparda eval` and `sparda report`: selectors on the same tasks, and the tables."""

import argparse
from typing import Any, get_args

from sparda_jax.checks import ConfigError, choice, integer, non_empty_text, number, path
from sparda_jax.cli.console import note
from sparda_jax.cli.model_options import add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, add_option
from sparda_jax.cli.sampling_options import add_seed_option
from sparda_jax.evaluation import plots
from sparda_jax.evaluation.report import compare, read_report, write_report
from sparda_jax.evaluation.run import FLOOR, check_budget, evaluate
from sparda_jax.evaluation.task_files import read_task_file
from sparda_jax.evaluation.tasks import get_task, task_names
from sparda_jax.evaluation.texts import words_available
from sparda_jax.models.decoder import Storage
from sparda_jax.sparse.selectors import get_selector

_DEFAULT_TASKS = (
    "passkey",
    "niah_single_1",
    "ruler_style_multikey_1",
    "latent_needle",
    "pydoc",
)
EXAMPLES = """\
examples:
  sparda eval --attention infllm_v2,sparda --lengths 2048 --budget 8,16 --out out
      the default tasks with dense attention and two selectors, two budgets
  sparda eval --attention all --tasks all --lengths 16384 --budget 12.5%,25% --out out
      everything, at shares of the blocks
  sparda eval --out out --time-limit 480 …
      stop after 8 minutes; the same command goes on where it stopped
  sparda report out
      the tables and plots again, from the files
  sparda eval --compare out-before out-after
      the differences between two evaluations
"""


def add_eval_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "eval",
        help="compare selectors on long-context tasks",
        description=(
            "Runs tasks with several selectors on the same samples, and writes every "
            "sample as JSON Lines, tables as Markdown and HTML, and plots. Dense is "
            "always run: a task on which it scores less than --floor is 'not measured'."
        ),
        epilog=EXAMPLES + "\n" + _task_help(),
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="print the differences between two directories, and run nothing",
    )
    add_model_options(parser, attention=False)
    _add_what_is_run(parser.add_argument_group("what is run"))
    _add_how_it_is_run(parser.add_argument_group("how it is run"))
    parser.set_defaults(run=_eval)


def _add_what_is_run(group: Any) -> None:
    add_option(
        group,
        "--attention",
        _names,
        metavar="A,B,…",
        default="all",
        help="selectors, or all that fit the model",
    )
    add_option(
        group,
        "--tasks",
        _names,
        metavar="T,…",
        default=",".join(_default_tasks()),
        help="tasks, or all; the default leaves out those whose extra is missing",
    )
    add_option(
        group,
        "--task-file",
        path,
        metavar="F",
        repeated=True,
        help="a file of RULER or SCBench (JSON Lines), LongBench v2 (JSON), or a text "
        "for perplexity; may be repeated",
    )
    add_option(
        group,
        "--lengths",
        _integers,
        metavar="N,…",
        default="2048",
        help="tokens of prompt and answer",
    )
    add_option(
        group,
        "--budget",
        _budgets,
        metavar="P,…",
        help="blocks a token reads, or shares such as 25%%; the model's own if not "
        "given",
    )


def _add_how_it_is_run(group: Any) -> None:
    add_option(
        group, "--samples", integer(1), metavar="N", default=20, help="of each task"
    )
    add_seed_option(group, "of the samples", default=42)
    add_option(
        group,
        "--storage",
        choice(*get_args(Storage)),
        words=get_args(Storage),
        default="per_layer",
        help="of the layers: stacked compiles in a fraction of the time, which counts "
        "where many selectors and budgets run, and decodes more slowly",
    )
    add_option(
        group, "--batch", integer(1), metavar="B", help="samples that run together"
    )
    add_option(
        group,
        "--floor",
        number(least=0, most=100),
        metavar="X",
        default=FLOOR,
        help="dense's least score on a task",
    )
    add_option(
        group,
        "--time-limit",
        number(above=0),
        metavar="S",
        help="begin nothing new after so many seconds; run again to go on",
    )
    add_option(
        group,
        "--commit",
        non_empty_text,
        metavar="C",
        help="state of the code, for run.json; git says it in a checkout",
    )
    add_option(group, "--out", path, metavar="DIR", help="where results are written")


def add_report_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "report",
        help="tables and plots of an evaluation",
        description="Writes report.md, report.html, summary.json and the plots of an "
        "evaluation anew, from its files, and prints the tables.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="the --out of an evaluation")
    parser.set_defaults(run=lambda arguments: _write(path("DIR", arguments.folder)))


def _default_tasks() -> tuple[str, ...]:
    """Those of the default that can run here."""
    words = words_available()
    return tuple(n for n in _DEFAULT_TASKS if words or not get_task(n).words)


def _task_help() -> str:
    lines = ["tasks (* needs words: pip install 'sparda-jax[eval]'):"]
    for name in task_names():
        task = get_task(name)
        marked = f"{name} *" if task.words else name
        lines.append(f"  {marked:26} {task.family}: {task.summary}")
    return "\n".join(lines)


def _names(field: str, value: object) -> tuple[str, ...]:
    parts = non_empty_text(field, value).split(",")
    return tuple(part.strip() for part in parts if part.strip())


def _integers(field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, str):
        return (integer(1)(field, value),)
    parts = [_integer(p) for p in _names(field, value)]
    return tuple(integer(1)(field, part) for part in parts)


def _budgets(field: str, value: object) -> tuple[int | str, ...]:
    parts = map(_integer, _names(field, value)) if isinstance(value, str) else (value,)
    return tuple(check_budget(field, part) for part in parts)


def _integer(written: str) -> int | str:
    """The number that a text stands for, or the text: a check then refuses it."""
    # `int` reads no number of thousands of digits.
    return int(written) if written.isdecimal() and len(written) < 20 else written


def _eval(arguments: argparse.Namespace) -> None:
    if arguments.compare is not None:
        folders = (path("--compare", folder) for folder in arguments.compare)
        print(compare(*folders).markdown(), end="")
        return
    if arguments.out is None:
        raise ConfigError("--out is missing: it must be a directory for the results")
    names = arguments.tasks
    if "all" in names:
        names = (*(n for n in names if n != "all"), *task_names())
    # What needs no model is refused before one is loaded.
    for name in names:
        get_task(name)
    for name in arguments.attention:
        if name != "all":
            get_selector(name)
    for file in arguments.task_file:
        read_task_file(file)
    lm = load_model(arguments, "dense", arguments.storage)
    outcome = evaluate(
        lm,
        out=arguments.out,
        attention=arguments.attention,
        tasks=names,
        lengths=arguments.lengths,
        budgets=arguments.budget or (),
        samples=arguments.samples,
        seed=arguments.seed,
        batch=arguments.batch,
        floor=arguments.floor,
        task_files=arguments.task_file,
        time_limit=arguments.time_limit,
        progress=True,
        commit=arguments.commit,
    )
    if outcome.done:
        _write(arguments.out)
    if not outcome.complete:
        left = outcome.planned - outcome.done - outcome.skipped
        note(
            f"stopped by --time-limit: {left} of {outcome.planned} cells are left; "
            "the same command goes on"
        )


def _write(folder: str) -> None:
    report = read_report(folder)
    written = write_report(report)
    print(report.markdown(), end="")
    note(f"written to {folder}: {', '.join(written)}")
    if not plots.available():
        note("no plots: they need matplotlib: pip install 'sparda-jax[eval]'")
