"""guidellm against the server, as its users run it.

Its requirements are many and its own, so it has an environment of its own:
`make clients`.
"""

import json

import pytest
from serving_client import KEY, run_client

import sparda_jax as sj
from sparda_jax.engine.compile_cache import PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_measures_what_generate_gives(server, clients_python, tmp_path, path):
    """Every request is answered with as many tokens as asked for, and its own text."""
    asked = [("ab the in", 8), ("the stop op", 5), ("a" * 300, 6), ("in on", 30)]
    data, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    lines = [{"prompt": p, "output_tokens_count": count} for p, count in asked]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
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
        *("--constraint", f"kind=max_requests,count={len(asked)}"),
        *("--data", f"kind=json_file,path={data}"),
        *("--output", f"kind=json,path={figures}"),
    )
    assert PROGRAMS.compiled == before
    (run,) = json.loads(figures.read_text(encoding="utf-8"))["benchmarks"]
    assert run["metrics"]["request_totals"]["successful"] == len(asked)
    assert not run["requests"]["errored"] and not run["requests"]["incomplete"]
    found = {}
    for one in run["requests"]["successful"]:
        body = json.loads(one["request_args"])["body"]
        prompt = body.get("prompt") or body["messages"][0]["content"][0]["text"]
        found[prompt] = (one["output"], one["output_tokens"])
        assert one["time_to_first_token_ms"] > 0 and one["prompt_tokens"] > 0
    for prompt, count in asked:
        if path == "/v1/completions":
            prompts = [prompt]
        else:
            messages = [{"role": "user", "content": prompt}]
            prompts = [server.lm.tokenizer.encode_chat(messages)]
        mine = sj.generate(server.lm, prompts, max_new_tokens=count, ignore_eos=True)
        assert found[prompt] == (mine.texts[0], count)
