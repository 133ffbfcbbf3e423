"""guidellm against the server, as its users run it, in environments of its own.

The last version that does without PyTorch is part of `.ci/run`; the newest one wants
`make clients`.
"""

import json

import pytest
from serving_client import KEY, run_client

import sparda_jax as sj
from sparda_jax.engine.compile_cache import PROGRAMS

# Prompts, and how many tokens to ask for.
ASKED = [("ab the in", 8), ("the stop op", 5), ("a" * 300, 6), ("in on", 30)]


def _write_prompts(path) -> None:
    lines = [{"prompt": p, "output_tokens_count": count} for p, count in ASKED]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def _check_answers(server, found, *, chat: bool) -> None:
    """Of each prompt: a text and a number of tokens, both those of `generate`."""
    for prompt, count in ASKED:
        prompts = [prompt]
        if chat:
            messages = [{"role": "user", "content": prompt}]
            prompts = [server.lm.tokenizer.encode_chat(messages)]
        mine = sj.generate(server.lm, prompts, max_new_tokens=count, ignore_eos=True)
        assert found[prompt] == (mine.texts[0], count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["text_completions", pytest.param("chat_completions", marks=pytest.mark.long)],
)
def test_guidellm_without_pytorch(server, guidellm_python, tmp_path, kind):
    data, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    _write_prompts(data)
    backend = {"api_key": KEY, "extra_body": {"temperature": 0}, "http2": False}
    before = PROGRAMS.compiled
    run_client(
        *(
            "env",
            f"GUIDELLM__PREFERRED_ROUTE={kind}",
            "GUIDELLM__MAX_WORKER_PROCESSES=1",
        ),
        *(guidellm_python, "-m", "guidellm", "benchmark", "run"),
        *("--disable-progress", "--disable-console-outputs"),
        *("--target", server.url, "--backend-args", json.dumps(backend)),
        *("--rate-type", "concurrent", "--rate", "3"),
        *("--max-requests", str(len(ASKED)), "--data", str(data)),
        *("--output-path", str(figures)),
    )
    assert PROGRAMS.compiled == before
    (run,) = json.loads(figures.read_text(encoding="utf-8"))["benchmarks"]
    requests = run["requests"]
    assert not requests["errored"] and not requests["incomplete"]
    assert len(requests["successful"]) == len(ASKED)
    assert all(one["time_to_first_token_ms"] > 0 for one in requests["successful"])
    found = {
        one["prompt"]: (one["output"], one["output_tokens"])
        for one in requests["successful"]
    }
    _check_answers(server, found, chat=kind == "chat_completions")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_measures_what_generate_gives(server, clients_python, tmp_path, path):
    """Every request is answered with as many tokens as asked for, and its own text."""
    data, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    _write_prompts(data)
    backend = {
        "kind": "openai_http",
        "target": server.url,
        "api_key": KEY,
        "request_format": path,
        "extras": {"body": {"temperature": 0}},
    }
    before = PROGRAMS.compiled
    run_client(
        *(clients_python, "-m", "guidellm", "run", "--disable-console"),
        *("--backend", json.dumps(backend)),
        *("--profile", "kind=concurrent,streams=3"),
        *("--constraint", f"kind=max_requests,count={len(ASKED)}"),
        *("--data", f"kind=json_file,path={data}"),
        *("--output", f"kind=json,path={figures}"),
    )
    assert PROGRAMS.compiled == before
    (run,) = json.loads(figures.read_text(encoding="utf-8"))["benchmarks"]
    assert run["metrics"]["request_totals"]["successful"] == len(ASKED)
    assert not run["requests"]["errored"] and not run["requests"]["incomplete"]
    found = {}
    for one in run["requests"]["successful"]:
        body = json.loads(one["request_args"])["body"]
        prompt = body.get("prompt") or body["messages"][0]["content"][0]["text"]
        found[prompt] = (one["output"], one["output_tokens"])
        assert one["time_to_first_token_ms"] > 0 and one["prompt_tokens"] > 0
    _check_answers(server, found, chat=path != "/v1/completions")
