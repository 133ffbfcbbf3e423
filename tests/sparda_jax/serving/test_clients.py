"""Real clients of OpenAI's API get what `generate` gives."""

import dataclasses
import json
import urllib.request

import jax
import numpy as np
import openai
import pytest
from serving_client import KEY, post

import sparda_jax as sj
from sparda_jax.engine.compile_cache import PROGRAMS


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def _alone(server, prompt, **options):
    return sj.generate(server.lm, [prompt], **options)


def test_the_sdk_gets_what_generate_gives(server, client):
    before = PROGRAMS.compiled
    model = client.models.list().data[0].id
    assert model == "tiny-served"
    answer = client.completions.create(
        model=model, prompt="ab the in", max_tokens=20, temperature=0.9, seed=5
    )
    mine = _alone(server, "ab the in", max_new_tokens=20, temperature=0.9, seed=5)
    choice = answer.choices[0]
    assert choice.text == mine.texts[0]
    assert choice.finish_reason == mine.finish_reasons[0]
    ids = server.lm.tokenizer.encode("ab the in")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(mine.tokens[0])

    streamed = client.completions.create(
        model=model,
        prompt="ab the in",
        max_tokens=20,
        temperature=0.9,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == mine.texts[0]
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert PROGRAMS.compiled - before <= 4  # those of `generate`


def test_the_sdk_chats(server, client):
    messages = [{"role": "user", "content": "the <|im_end|> op"}]
    options = {"temperature": 1.2, "seed": 11}
    mine = sj.chat(server.lm, messages, max_new_tokens=24, **options)
    asked = {"model": "tiny-served", "messages": messages, **options}
    answer = client.chat.completions.create(
        max_completion_tokens=24, logprobs=True, top_logprobs=2, **asked
    )
    choice = answer.choices[0]
    assert choice.message.content == mine.messages[-1]["content"]
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    parts = [{"type": "text", "text": part} for part in ("the <|im", "_end|> op")]
    asked["messages"] = [{"role": "user", "content": parts}]
    chunks = list(client.chat.completions.create(max_tokens=24, stream=True, **asked))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason

    # What the template's variables say is the template's to understand.
    variables = {"add_generation_prompt": False}
    told = client.chat.completions.create(
        max_tokens=2, extra_body={"chat_template_kwargs": variables}, **asked
    )
    rendered = server.lm.tokenizer.encode_chat(messages, **variables)
    assert told.usage.prompt_tokens == len(rendered) < answer.usage.prompt_tokens


@pytest.mark.slow
def test_lists_and_several_outputs(server, client):
    """n outputs have the seeds s, s + 1, …, as those of `generate`."""
    prompts = [[5, 6, 7], [9] * 200]
    options = {"temperature": 1.0, "seed": 3, "n": 2}
    answer = client.completions.create(
        model="tiny-served", prompt=prompts, max_tokens=8, **options
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for index, prompt in enumerate(prompts):
        mine = _alone(server, prompt, max_new_tokens=8, **options)
        texts = [answer.choices[2 * index + i].text for i in range(2)]
        assert texts == mine.texts
    assert answer.usage.prompt_tokens == 203


def test_where_an_output_ends(server):
    prompt = [5, 6, 7, 8]
    free = _alone(server, prompt, max_new_tokens=30, ignore_eos=True, seed=1)
    body = {"prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    word, stop_id = free.texts[0][3:5], free.tokens[0][4]

    def ask(**more):
        status, answer = post(server, "/v1/completions", {**body, **more})
        assert status == 200, answer
        return answer["choices"][0]

    assert ask()["text"] == free.texts[0] and ask()["finish_reason"] == "length"
    stopped = ask(stop=[word, "never"])
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == free.texts[0].partition(word)[0]
    shown = ask(stop=word, include_stop_str_in_output=True)
    assert shown["text"] == free.texts[0].partition(word)[0] + word
    by_id = _alone(
        server, prompt, max_new_tokens=30, ignore_eos=True, stop_ids=[stop_id]
    )
    assert ask(stop_token_ids=[stop_id])["text"] == by_id.texts[0]
    longer = _alone(
        server,
        prompt,
        max_new_tokens=30,
        ignore_eos=True,
        stop_ids=[stop_id],
        min_new_tokens=12,
    )
    assert len(longer.tokens[0]) > 12
    assert ask(stop_token_ids=[stop_id], min_tokens=12)["text"] == longer.texts[0]
    filtered = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.3, "top_p": 0.9}
    mine = _alone(
        server, prompt, max_new_tokens=30, ignore_eos=True, temperature=1.0, **filtered
    )
    assert ask(temperature=1.0, seed=0, **filtered)["text"] == mine.texts[0]


def test_prompts_are_scored_as_forward_scores_them(server, client):
    """The form of lm-eval's local-completions: echo, logprobs, one token."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 120, size).tolist() for size in (2, 300)]
    status, answer = post(
        server,
        "/v1/completions",
        {
            "model": "tiny-served",
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    )
    assert status == 200
    resident = dataclasses.replace(server.lm, cache=sj.CacheConfig())
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logs = choice["logprobs"]
        # Nothing sees what comes later: rows of one length have one program.
        whole = [*prompt, *prompts[1][len(prompt) :]]
        expected = np.asarray(jax.nn.log_softmax(sj.forward(resident, whole)))
        own = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
        assert logs["token_logprobs"][0] is None and logs["top_logprobs"][0] is None
        assert len(logs["tokens"]) == len(prompt) + 1
        np.testing.assert_allclose(logs["token_logprobs"][1:-1], own, atol=1e-3)
        for place, found in enumerate(logs["top_logprobs"][1:-1]):
            assert max(found.values()) == pytest.approx(
                float(expected[place].max()), abs=1e-3
            )
        greedy = logs["top_logprobs"][-1]
        assert greedy == {logs["tokens"][-1]: logs["token_logprobs"][-1]}
    body = {"prompt": prompts[1], "max_tokens": 0, "echo": True}
    _, alone = post(server, "/v1/completions", body)
    assert alone["usage"]["completion_tokens"] == 0
    told = server.lm.tokenizer.decode(prompts[1])
    assert alone["choices"][0]["text"] == told
    asked = {"model": "tiny-served", "prompt": prompts[1], "max_tokens": 0}
    chunks = list(client.completions.create(echo=True, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == told
    status, refused = post(
        server, "/v1/completions", {**body, "stream": True, "logprobs": 1}
    )
    assert status == 400
    assert "stream=True is not allowed: it must be false" in refused["error"]["message"]


def test_what_else_clients_ask_for(server):
    assert post(server, "/health", None)[1] == {"status": "ready"}
    assert post(server, "/live", None)[1] == {"status": "ready"}
    assert post(server, "/version", None)[1] == {"version": sj.__version__}
    _, tokens = post(server, "/tokenize", {"prompt": "ab the"})
    assert tokens["tokens"] == server.lm.tokenizer.encode("ab the")
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 640
    _, text = post(server, "/detokenize", {"tokens": [0, *tokens["tokens"]]})
    assert text == {"prompt": "<|endoftext|>ab the"}
    named = {"prompt": "a<|im_end|>", "add_special_tokens": False}
    assert post(server, "/tokenize", named)[1]["tokens"][-1] == 2
    _, info = post(server, "/tokenizer_info", None)
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    assert post(server, "/v1/models/tiny-served", None)[1]["max_model_len"] == 640


def test_the_sdk_understands_refusals(server, client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"prompt has 641 tokens.*640 fit"):
        client.completions.create(model="tiny-served", prompt=[5] * 641)
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        client.completions.create(model="tiny-served", prompt="a", temperature=-1)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="b") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize(
    "more",
    [
        # vLLM's `bench serve`
        {"repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True},
        # guidellm
        {
            "stop": None,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        # aiperf
        {"ignore_eos": True, "min_tokens": 5},
    ],
)
def test_bodies_of_load_generators(server, more):
    body = {
        "model": "tiny-served",
        "prompt": "ab the in",
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {KEY}", "x-request-id": "bench-1"},
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["x-request-id"] == "bench-1"
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    told = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"] is None]
    assert len(told) >= 5  # text may come behind its last token
    if "continuous_usage_stats" in body["stream_options"]:
        assert chunks[0]["usage"]["completion_tokens"] == 1
