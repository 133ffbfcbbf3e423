"""Processes of several hosts give what one gives, by the flags of `sparda generate`."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from text_model import text_tokenizer
from tiny_directory import tiny_directory

from sparda_jax.config import ConfigError
from sparda_jax.hosts import check_same_words, join_hosts, speaks

__all__ = ["text_tokenizer"]

ROOT = pathlib.Path(__file__).parents[2]


def _generate(*words: str, devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sparda_jax.cli", "generate", *words],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _two(words: list[str], *others: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of two processes; `others` are the second's alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    started = [
        _generate(*words, *shared, "0"),
        _generate(*words, *shared, "1", *others),
    ]
    ended = [process.communicate() for process in started]
    return [
        (process.returncode, *texts)
        for process, texts in zip(started, ended, strict=True)
    ]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, text_tokenizer):
    """Two devices of one process, then one of each of two; and two that disagree."""
    model = str(tiny_directory(tmp_path / "tiny", text_tokenizer))
    words = ["--model", model, "--attention", "sparda", "--forecast", "from_query"]
    words += ["--cache", "offload", "--prompt", "ab op " * 100, "--block-budget", "4"]
    words += ["--local-blocks", "1", "--max-new-tokens", "9", "--json"]
    words += ["--mesh", "model=2"]
    alone = _generate(*words, devices=2)
    out, errors = alone.communicate()
    assert alone.returncode == 0, errors
    first, second = _two(words)
    assert first[0] == second[0] == 0, (first, second)
    assert "{" not in second[1]  # The collectives of a CPU print a line of their own.
    one, two = (json.loads(text.splitlines()[-1]) for text in (out, first[1]))
    assert one["text"] == two["text"]
    for ended in _two(words, "--seed", "5"):
        assert ended[0] == 2
        assert "process 1 was asked for something else than process 0" in ended[2]


def test_a_process_alone_agrees_with_itself():
    check_same_words(["anything"])
    assert speaks()


def test_flags_of_hosts_come_together():
    with pytest.raises(ConfigError, match="together with --coordinator"):
        join_hosts(None, 2, None)
    with pytest.raises(ConfigError, match=r"--process-id=2 .* below"):
        join_hosts("here:1", 2, 2)


@pytest.mark.parametrize("address", ["here", "here:abc", ":1", "here:0", "here:99999"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ConfigError, match=r"--coordinator=.*HOST:PORT"):
        join_hosts(address, 1, 0)


def test_a_port_in_use_is_refused_by_the_first_process():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .* cannot be listened at"):
            join_hosts(f"127.0.0.1:{port}", 2, 0)
