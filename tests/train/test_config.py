"""Every field of every configuration, with values that no field takes."""

import dataclasses
import json
import re
import subprocess
import sys
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from sparda_jax.config import ConfigError, SparseConfig
from train import config as configs
from train.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    load_config,
    with_overrides,
)
from train.main import main

pytestmark = pytest.mark.usefixtures("without_type_checks")

CLASSES = [
    value
    for value in vars(configs).values()
    if isinstance(value, type)
    and dataclasses.is_dataclass(value)
    and value.__module__ == configs.__name__
]
FIELDS = [(kind, field.name) for kind in CLASSES for field in dataclasses.fields(kind)]


class Hostile:
    """Raises whatever is done to it."""

    def _raise(self, *_):
        raise RuntimeError("no\nlines")

    __index__ = __float__ = __bool__ = __eq__ = __len__ = __iter__ = _raise
    __repr__ = __hash__ = __fspath__ = __getattr__ = _raise


# None of them is allowed in any field.
WRONG = [
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    -(10**400),
    10**5000,
    2**31,
    -1,
    -0.5,
    b"bytes",
    "",
    "\ud800",
    "\udcff",
    "a\0b",
    "no such word",
    1j,
    [],
    [[1, 2], [3]],
    {"a": 1},
    object(),
    Hostile(),
    np.array([1, 2]),
    np.array(["fine", "max"]),
    np.array("x"),
    jnp.ones((2, 2)),
    np.float32("nan"),
    np.datetime64("2020-01-01"),
    TrainConfig,
    lambda: 3,
]
# Fields with text of any kind, and what is a text for them.
TEXTS = {"name": ("no such word", "a\0b"), "model": ("no such word",)}
TEXTS["out"] = TEXTS["model"]


def _refuses(kind, name, value) -> None:
    with pytest.raises(ConfigError) as error:
        kind(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{kind.__name__}.{name}"), message
    assert " is not allowed: it must be " in message and "\n" not in message
    assert len(message) < 400
    message.encode("utf-8")


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_wrong_values_are_one_line(kind, name):
    for value in WRONG:
        fine = TEXTS.get(name, ())
        if not any(type(value) is type(x) and value == x for x in fine):
            _refuses(kind, name, value)
    hint = typing.get_type_hints(kind)[name]
    if hint is not bool:
        for value in (True, np.bool_(False), jnp.bool_(True)):
            _refuses(kind, name, value)
    if type(None) not in typing.get_args(hint):
        _refuses(kind, name, None)
    if hint is int or hint == int | None:
        for value in (1.0, "1", 1.5, np.float64(2), 2**63):
            _refuses(kind, name, value)


def test_any_librarys_numbers_are_numbers():
    optimizer = OptimizerConfig(
        steps=np.int64(7),
        global_batch=jnp.int32(4),
        lr=np.float32(0.5),
        beta1=0,
        warmup_steps=np.uint8(3),
    )
    assert [type(x) for x in (optimizer.steps, optimizer.beta1)] == [int, float]
    assert type(optimizer.lr) is float and optimizer.lr == 0.5
    assert optimizer == dataclasses.replace(
        OptimizerConfig(), steps=7, global_batch=4, lr=0.5, beta1=0.0, warmup_steps=3
    )
    data = DataConfig(sources=[["stdlib", np.float64(2)], ("pydoc", 1)])
    assert data.sources == (("stdlib", 2.0), ("pydoc", 1.0))
    json.dumps(TrainConfig(optimizer=optimizer, data=data).identity())


@pytest.mark.parametrize(
    "sources",
    [
        (("records:-1", 1.0),),
        (("records:x", 1.0), ("stdlib", 1.0)),
        "stdlib",
        ["stdlib"],
        [("stdlib",)],
        [("stdlib", 1, 2)],
        [("stdlib", 0)],
        [("stdlib", -1)],
        [("stdlib", "1")],
        [("stdlib", 1e-300)],
        [(b"stdlib", 1)],
        [("", 1)],
        [("caf\udce9", 1)],
        [(3, 1)],
        [{"stdlib", 1}],
        {"stdlib": 1},
        5,
        iter([("stdlib", 1)]),
    ],
)
def test_wrong_sources_are_one_line(sources):
    with pytest.raises(ConfigError, match=r"^DataConfig\.sources") as error:
        DataConfig(sources=sources)
    assert "\n" not in str(error.value)


def test_fields_that_do_not_fit_together():
    with pytest.raises(ConfigError, match=r"tile=512 .* at most DataConfig.*=256"):
        TrainConfig(loss=LossConfig(tile=512), data=DataConfig(seq_len=256))
    with pytest.raises(ConfigError, match=r"a multiple of SparseConfig\.block_size"):
        TrainConfig(sparse=SparseConfig(), data=DataConfig(seq_len=100))
    with pytest.raises(ConfigError, match='"mass" unless student is "blocks"'):
        LossConfig(target="recall")


def test_the_best_checkpoint_is_exported_only_where_one_is_known():
    assert TrainConfig(export_best=True).export_best
    for change in (
        {"data": DataConfig(held_out=0.0)},
        {"checkpoint": CheckpointConfig(keep_best=0)},
    ):
        assert not TrainConfig(**change).export_best
        with pytest.raises(ConfigError, match=r"export_best=True .*keep_best is 0"):
            TrainConfig(export_best=True, **change)


def test_overrides_of_any_field_are_one_line():
    """Whatever text stands behind the sign of equality."""
    config = TrainConfig()
    words = ["nan", "inf", "1e999", "-1", "9" * 5000, "[" * 300, "{[]: 1}", "\ud800"]
    words += ["", "(", "'\\d'", "1 if 2 else 3", "b'x'", "\0", "lambda: 1", "-" * 300]
    names = [name for name in configs._fields(config) if name.split(".")[-1] != "name"]
    free = ("model", "out")
    for name in names:
        for word in words:
            if name in free and word not in ("", "\ud800", "\0"):
                continue
            with pytest.raises(ConfigError) as error:
                with_overrides(config, [f"{name}={word}"])
            assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for setting in ("lr", "=", "=1", "x" * 10_000 + "=1", "every=2", 5, None):
        with pytest.raises(ConfigError, match=r"^--set") as error:
            with_overrides(config, [setting])
        assert len(str(error.value)) < 500
    pair = ["sparse.kernel_size=8", "sparse.kernel_stride=4"]  # neither fits alone
    windows = with_overrides(TrainConfig(sparse=SparseConfig()), pair).sparse
    assert windows is not None and windows.kernel_size == 8
    changed = with_overrides(config, ["mass=false", "devices=1", "tile=None", "lr=1"])
    assert changed.eval.mass is False and changed.parallel.devices == 1
    assert changed.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def get_config(:", "it raised SyntaxError"),
        (b"\xff", "it raised SyntaxError"),
        (b"\0", "it raised"),
        (b"import no_such_module_at_all", "it raised ModuleNotFoundError"),
        (b"raise ValueError('two\\nlines')", "it raised ValueError: two lines"),
        (b"get_config = 3", "a Python file with get_config"),
        (b"def get_config(x): pass", "it raised TypeError"),
        (b"def get_config(): return 3", "a train.config.TrainConfig"),
        (
            b"from train.config import *\n"
            b"def get_config(): return TrainConfig(seed=-1)",
            r"^sparda: TrainConfig.seed=-1",
        ),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "config.py"
    path.write_bytes(content)
    assert main(["--config", str(path)]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1
    assert re.search(message, told.err.strip())


def test_no_file_is_one_line(tmp_path, capsys):
    for name in ("none.py", "x" * 5000, ".", "a\0b", "\ud800", "/dev/zero"):
        assert main(["--config", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError, match="a path"):
        load_config(3)


def test_wrong_flags_are_one_line(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text("from train.config import *\nget_config = TrainConfig")
    flags = [
        ["--num-processes", "2"],
        ["--process-id", "0"],
        ["--coordinator", "localhost:1", "--num-processes", "0"],
        ["--coordinator", "x:1", "--num-processes", "2", "--process-id", "2"],
        ["--coordinator", "x:1", "--num-processes", "2", "--process-id", "-1"],
        ["--coordinator", "no port", "--num-processes", "1", "--process-id", "0"],
        ["--set", "parallel.devices=9999", f"out={tmp_path / 'out'}"],
    ]
    for some in flags:
        assert main(["--config", str(path), *some]) == 2, some
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith("sparda: "), told


@pytest.mark.slow
@pytest.mark.long  # `test_a_path_may_hold_bytes_that_are_not_utf8`
def test_bytes_that_are_not_text_on_the_command_line(tmp_path):
    """The exit status and the line are those of a process, not of a call."""
    command = [sys.executable, "-m", "train.main", "--config", b"caf\xe9.py"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
