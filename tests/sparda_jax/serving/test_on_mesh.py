"""`sparda serve --mesh`: a process on two devices gives what one device gives."""

import contextlib
import http.client
import json
import signal
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_client import ServeProcess, connect, post, serve_process

import sparda_jax as sj

# As the fixture `lm`, of which two prompts here are longer than what a token reads.
MODEL = "--model tiny --attention sparda --forecast from_query --local-blocks 2"
ROOM = "--block-budget 6 --cache offload --device-blocks 8 --route dynamic_slice"
SERVER = "--mesh model=2 --max-batch 2 --max-context 1024 --prefill-chunk 256"
LIMITS = "--max-new-tokens 400 --prefix-bytes 0 --decode-steps 4"


def _figures(server: ServeProcess) -> dict[tuple[str, str | None], float]:
    """What /metrics says, by name and how requests ended."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def _answers(server: ServeProcess, bodies: list[dict]) -> list[dict]:
    """What requests that run side by side are answered."""
    found: dict[int, tuple[int, dict]] = {}

    def ask(number: int) -> None:
        found[number] = post(server, "/v1/completions", bodies[number])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n][0] for n in range(len(bodies))] == [200] * len(bodies), found
    return [found[n][1]["choices"][0] for n in range(len(bodies))]


@contextlib.contextmanager
def _streamed(server: ServeProcess, body: dict) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request that is called "mine", as it comes."""
    with contextlib.closing(connect(server)) as client:
        path, named = "/v1/completions", {"x-request-id": "mine"}
        client.request("POST", path, json.dumps(body), named)
        yield client.getresponse()


@pytest.mark.slow
@pytest.mark.long  # a process of one device: `cli/test_serve`; two: `engine/test_mesh`
def test_a_process_on_two_devices_answers_as_one_device(lm, token_ids):
    prompts = [token_ids(600), token_ids(450, seed=1), [9, 10]]
    asked = [{"temperature": 0.0}, {"temperature": 1.5, "seed": 7}, {"seed": 3}]
    with serve_process(
        *f"{MODEL} {ROOM} {SERVER} {LIMITS}".split(),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
    ) as server:
        more = {"max_tokens": 12, "ignore_eos": True, "logprobs": 0}
        bodies = [
            {"prompt": prompt, **more, **how}
            for prompt, how in zip(prompts, asked, strict=True)
        ]
        choices = _answers(server, bodies)

        long = {"prompt": [5], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with _streamed(server, long) as stream:
            assert stream.readline().startswith(b"data: ")
            assert post(server, "/v1/requests/mine", None, method="DELETE")[0] == 200
            assert b"the request was cancelled" in stream.read()
        [again] = _answers(server, bodies[:1])

        figures = _figures(server)
        with _streamed(server, long) as stream:
            first = stream.readline()
            server.process.send_signal(signal.SIGTERM)
            rest = stream.read()
    assert first.startswith(b"data: ") and rest.endswith(b"data: [DONE]\n\n")
    assert server.process.returncode in (0, -signal.SIGTERM)

    for prompt, how, choice in zip(prompts, asked, choices, strict=True):
        how = {"temperature": 1.0, **how}
        out = sj.generate(lm, [prompt], max_new_tokens=12, ignore_eos=True, **how)
        wanted = [f"token_id:{token}" for token in out.tokens[0]]
        assert choice["logprobs"]["tokens"] == wanted
    assert again == {**choices[0], "index": 0}
    assert figures["vllm:request_success_total", "length"] == 4
    assert figures["vllm:request_success_total", "cancelled"] == 1
    for name in ("sparda:fetch_misses", "sparda:fetched_bytes"):
        assert figures[name, None] > 0
