"""The status page in a browser."""

import dataclasses
import re
import shutil
import socket
import subprocess
import threading

import pytest
from patience import PATIENCE
from serving_client import post

from sparda_jax.serving.app import Server

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    """Its command; asked for before a server is started."""
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@pytest.fixture
def open_url(server):
    """The server without a key: a browser without a screen is asked for none."""
    import uvicorn

    serving = server.serving
    settings = dataclasses.replace(serving.settings, api_key=None)
    app = Server(serving.session, serving.scheduler, serving._metrics, settings).app()
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, lifespan="off")
    made = uvicorn.Server(config)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    made.should_exit = True
    thread.join()
    listening.close()


@pytest.mark.slow
def test_a_browser_shows_live_rows(browser, server, open_url, tmp_path):
    """Its script runs, asks again, and shows the requests that run, as text."""
    going, answered = threading.Event(), threading.Event()
    going.set()

    def load() -> None:
        body = {"prompt": [5] * 150, "max_tokens": 60, "ignore_eos": True}
        while going.is_set():
            post(server, "/v1/completions", body, **{"x-request-id": "seen:by.all"})
            answered.set()

    # Several: while one asks again, others run.
    users = [threading.Thread(target=load) for _ in range(3)]
    for user in users:
        user.start()
    try:
        assert answered.wait(PATIENCE)
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000"]
        done = subprocess.run(
            [*command, "--dump-dom", open_url],
            capture_output=True,
            text=True,
        )
    finally:
        going.clear()
        for user in users:
            user.join()
    page = done.stdout
    shown = dict(re.findall(r'<\w+ id="(\w+)"[^>]*>([^<]*)<', page))
    assert shown["model"] == "tiny-served" and shown["state"] == "ready", done.stderr
    assert shown["problem"] == "" and re.fullmatch(r"\d / 3", shown["taken"])
    assert float(shown["rate"]) > 0 and shown["hits"].endswith(" %")
    assert shown["link"].endswith(" GB/s")  # it has asked at least twice
    assert "seen:by.all" in page and re.search(r"<td>\d+ / 60</td>", page)
