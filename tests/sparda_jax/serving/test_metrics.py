"""What a server says of itself."""

import json
import logging
import re
import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from serving_client import KEY, post

VLLM = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
}


def _get(server, path: str) -> str:
    request = urllib.request.Request(server.url + path)
    request.add_header("Authorization", f"Bearer {KEY}")
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def _samples(server) -> dict[str, float]:
    families = text_string_to_metric_families(_get(server, "/metrics"))
    return {
        f"{sample.name}/{sample.labels.get('finished_reason', '')}": sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels and not sample.name.endswith("_created")
    }


def test_figures_and_log_lines_of_requests(server, caplog):
    server.settle()
    before = _samples(server)
    body = {"prompt": [5] * 300, "max_tokens": 9, "ignore_eos": True}
    with caplog.at_level(logging.INFO, "sparda_jax.serving"):
        post(server, "/v1/completions", body, **{"x-request-id": "counted"})
        post(server, "/v1/completions", {**body, "prompt": "secret", "top_p": 7})
    server.settle()
    after = _samples(server)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["vllm:prompt_tokens_total/"] == 300
    assert grown["vllm:generation_tokens_total/"] == 9
    assert grown["vllm:request_success_total/length"] == 1
    assert grown["vllm:time_to_first_token_seconds_count/"] == 1
    assert grown["vllm:inter_token_latency_seconds_count/"] == 8
    assert grown["sparda:fetch_hits/"] + grown["sparda:fetch_misses/"] > 0
    families = {name.partition("/")[0] for name in after}
    for name in VLLM:
        assert any(one.startswith(f"vllm:{name}") for one in families), name
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    told = {line["event"]: line for line in lines}
    assert told["accepted"]["request_id"] == told["ended"]["request_id"] == "counted"
    assert told["ended"]["new_tokens"] == 9 and told["ended"]["reason"] == "length"
    assert told["refused"]["status"] == 400
    assert "secret" not in caplog.text


def test_the_status_page_shows_what_status_says(server):
    page = _get(server, "/")
    status = json.loads(_get(server, "/status"))
    assert status["state"] == "ready" and status["model"] == "tiny-served"
    assert status["rows"] == 3 and status["running"] == []
    assert {"hits", "misses", "fetched_bytes", "recall"} == status["offload"].keys()
    ids = set(re.findall(r'id="(\w+)"', page))
    assert set(re.findall(r'at\("(\w+)"\)', page)) <= ids
    assert set(re.findall(r"status\.(\w+)", page)) - {"status"} <= status.keys()
