"""`sparda serve`: its options, and a process that is told to stop."""

import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request

import pytest
from serving_client import serve_process

from sparda_jax.checks import ConfigError
from sparda_jax.cli import serve
from sparda_jax.cli.console import waiting
from sparda_jax.cli.main import build_parser, main
from sparda_jax.serving import server


def test_options_are_environment_variables(monkeypatch):
    monkeypatch.setenv("SPARDA_SERVE_MAX_BATCH", "5")
    monkeypatch.setenv("SPARDA_SERVE_MODEL", "tiny")
    monkeypatch.setenv("SPARDA_SERVE_PORT", "1234")
    arguments = build_parser().parse_args(["serve", "--port", "99"])
    assert (arguments.max_batch, arguments.model, arguments.port) == (5, "tiny", 99)
    # Those of other commands are their own.
    assert build_parser().parse_args(["demo"]).model != "tiny"
    monkeypatch.setenv("SPARDA_SERVE_MAX_BATCH", "many")
    with pytest.raises(ConfigError, match=r"--max-batch='many' is not allowed"):
        build_parser().parse_args(["serve"])


def test_an_address_that_cannot_be_had_is_told_before_anything_is_loaded(
    capsys, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("the address is tried first")

    monkeypatch.setattr(serve, "load_model", never)
    with socket.create_server(("127.0.0.1", 0)) as held:
        taken = str(held.getsockname()[1])
        for address in (
            ["--port", taken],
            ["--host", "no-such-host.invalid"],
            ["--host", "300.1.1.1"],
            ["--host", "::zz"],
            ["--host", "x" * 300],
            ["--host", "a\0b"],
            ["--host", "192.0.2.1"],
        ):
            assert main(["serve", "--model", "tiny", "--port", "0", *address]) == 2
            told = capsys.readouterr().err
            assert told.startswith("sparda: --host=") and told.count("\n") == 1, told
            assert "cannot be listened at" in told


def test_a_cache_that_evicts_is_refused_before_a_model_is_loaded(capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the cache is looked at first")

    monkeypatch.setattr(serve, "load_model", never)
    command = ["serve", "--model", "tiny", "--port", "0", "--attention", "snapkv"]
    assert main([*command, "--cache", "evict"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sparda: --cache='evict' is not") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--mesh 2", "--mesh=2 is not allowed"),
        ("--mesh data=2", "mesh='data=2,model=1' is not allowed: it must be data=1"),
        (
            "--mesh model=64",
            "model=64' is not allowed: it must be at most",
        ),
        ("--mesh model=1 --cache evict", "--cache='evict' is not allowed"),
        (
            "--mesh model=1 --cache offload --route host_loop",
            "'host_loop' is not",
        ),
        ("--mesh model=1 --weights int8", "weights='int8' is not allowed with mesh"),
    ],
)
def test_a_mesh_that_cannot_serve_is_refused_before_a_model_is_opened(
    capsys, monkeypatch, words, told
):
    def never(*_, **__):
        raise AssertionError("the mesh is looked at first")

    monkeypatch.setattr("sparda_jax.loading.open_model", never)
    monkeypatch.setattr("sparda_jax.loading.build_decoder", never)
    assert main(["serve", "--model", "tiny", "--port", "0", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparda: ") and said.count("\n") == 1, said
    assert told in said


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")]
)
def test_the_address_that_is_told_is_one_for_a_browser(host, url):
    if ":" in host and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no addresses of version 6 here")
    with server.bind(host, 0) as taken:
        assert server.url_of(taken) == f"{url}{taken.getsockname()[1]}"


def test_an_address_is_one_servers_from_the_start():
    """Not from when it answers: two that load models would both believe to have it."""
    with server.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ConfigError, match=f"port={port} cannot be listened at"):
                server.bind(host, port)
    with server.bind("127.0.0.1", port):
        pass
    with pytest.raises(ConfigError, match="port=70000 cannot be listened at"):
        server.bind("127.0.0.1", 70000)


def test_what_takes_long_is_told_while_it_does(capsys):
    before = threading.active_count()
    with pytest.raises(MemoryError), waiting("taking memory", every=0.01):
        told = capsys.readouterr().err
        assert told.startswith("taking memory …\n")
        while len(re.findall(r"taking memory: \d+ s\n", told)) < 2:
            told += capsys.readouterr().err
            time.sleep(0.01)
        raise MemoryError
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_process_finishes_what_it_accepted():
    words = "--model tiny --max-context 512 --max-batch 2".split()
    with serve_process(*words, SPARDA_SERVE_MAX_NEW_TOKENS="300") as server:
        body = {"prompt": [5], "max_tokens": 300, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request) as answer:
            first = answer.readline()
            server.process.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
    assert first.startswith(b"data: ") and rest.endswith("data: [DONE]\n\n")
    assert rest.count("data: ") >= 300
    assert server.process.returncode in (0, -signal.SIGTERM)
