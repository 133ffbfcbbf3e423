"""Generation: stops, seeds, batches, streaming, turns, buckets, and bad input."""

import functools
import math

import jax
import numpy as np
import pytest

import sparda_jax as sj
from sparda_jax.config import ConfigError
from sparda_jax.inference.shapes import (
    bucket,
    capacity_blocks,
    plan_shapes,
    tile_tokens,
)


@pytest.fixture(scope="module")
def prompts(token_ids):
    return [token_ids(length, seed=length) for length in (300, 3, 130)]


@pytest.fixture(scope="module")
def greedy(lm, prompts):
    return sj.generate(lm, prompts, max_new_tokens=24, ignore_eos=True)


def _hot(lm, prompts, seed, **settings):
    settings = {"temperature": 1.5, "max_new_tokens": 24, **settings}
    return sj.generate(lm, prompts, seed=seed, ignore_eos=True, **settings).tokens


def test_greedy_is_argmax_of_forward(lm, prompts, greedy):
    for prompt, tokens in zip(prompts, greedy.tokens, strict=True):
        assert len(tokens) == 24
        # Nothing sees what comes later: rows of one length have one program.
        later = prompts[0][len(prompt) :]
        logits = np.asarray(sj.forward(lm, [*prompt, *tokens[:-1], *later]))
        own = logits[len(prompt) - 1 : len(prompt) + 23]
        assert own.argmax(-1).tolist() == tokens


@pytest.mark.slow
@pytest.mark.long  # one of the rows, sampled: `test_seeds`
def test_sequence_does_not_depend_on_its_neighbours(lm, prompts, greedy):
    for index, prompt in enumerate(prompts):
        alone = sj.generate(lm, [prompt], max_new_tokens=24, ignore_eos=True)
        assert alone.tokens[0] == greedy.tokens[index]


@pytest.mark.slow
def test_seeds(lm, prompts):
    first = _hot(lm, prompts, seed=5)
    assert first == _hot(lm, prompts, seed=5)
    assert first != _hot(lm, prompts, seed=6)
    assert first[1] == _hot(lm, [prompts[1]], seed=5)[0]
    twins = _hot(lm, [prompts[0]] * 3, seed=[5, 6, 5])
    assert twins[0] == twins[2] == first[0]
    assert twins[0] != twins[1]


@pytest.mark.slow
def test_one_dispatch_gives_the_same_tokens(lm, prompts, greedy):
    out = sj.generate(lm, prompts, max_new_tokens=24, ignore_eos=True, single_call=True)
    assert out.tokens == greedy.tokens
    assert out.stats.prefill_seconds is None


@pytest.mark.slow
@pytest.mark.long  # a stream of a cut prompt: below
def test_a_cut_prompt_gives_the_same_tokens(lm, prompts, greedy):
    out = sj.generate(
        lm, prompts, max_new_tokens=24, ignore_eos=True, prefill_chunk=128
    )
    assert out.tokens == greedy.tokens


# A row alone in pieces has the programs of a further turn.
@pytest.mark.parametrize(
    ("rows", "tokens_per_call", "chunk"),
    [
        (1, 1, 128),
        (3, 7, None),
        pytest.param(3, 1, 128, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_stream_yields_the_same_tokens(
    lm, prompts, greedy, rows, tokens_per_call, chunk
):
    seen = []
    stream = sj.stream(
        lm,
        prompts[:rows],
        max_new_tokens=24,
        ignore_eos=True,
        tokens_per_call=tokens_per_call,
        prefill_chunk=chunk,
        on_progress=seen.append,
    )
    got = [[] for _ in range(rows)]
    for event in stream:
        got[event.index].append(event.token)
    assert got == greedy.tokens[:rows]
    assert stream.output is not None
    assert stream.output.tokens == greedy.tokens[:rows]
    # 300 tokens in chunks of 128.
    assert seen == ([300] if chunk is None else [128, 128, 44])


def test_stop_id_ends_only_its_row(lm, prompts, greedy):
    """Every row stops where the stop token first stands in its own output."""
    stop = greedy.tokens[0][5]
    out = sj.generate(lm, prompts, max_new_tokens=24, ignore_eos=True, stop_ids=[stop])
    for tokens, whole, reason in zip(
        out.tokens, greedy.tokens, out.finish_reasons, strict=True
    ):
        end = whole.index(stop) + 1 if stop in whole else 24
        assert tokens == whole[:end]
        assert reason == ("stop" if stop in whole else "length")
    assert out.finish_reasons[0] == "stop"


def test_eos_of_the_model_ends_a_row(text_lm):
    (token,), prompt = text_lm.config.eos_ids, [5, 6, 7]
    how = {"max_new_tokens": 400, "temperature": 2.0, "seed": 7}
    whole = sj.generate(text_lm, [prompt], ignore_eos=True, **how).tokens[0]
    out = sj.generate(text_lm, [prompt], **how)
    assert len(whole) == 400
    assert out.tokens[0] == whole[: whole.index(token) + 1]
    assert out.finish_reasons == ["stop"]


@pytest.mark.slow
def test_further_turn_is_one_prompt(lm, prompts, token_ids):
    more = [token_ids(length, seed=50 + length) for length in (40, 200, 1)]
    first = sj.generate(lm, prompts, max_new_tokens=5, ignore_eos=True)
    turn = sj.generate(
        lm,
        more,
        max_new_tokens=10,
        ignore_eos=True,
        conversation=first.conversation,
    )
    whole = [
        [*prompt, *tokens, *new]
        for prompt, tokens, new in zip(prompts, first.tokens, more, strict=True)
    ]
    expected = sj.generate(lm, whole, max_new_tokens=10, ignore_eos=True)
    assert turn.tokens == expected.tokens
    with pytest.raises(ConfigError, match="used up"):
        sj.generate(lm, more, conversation=first.conversation)


def test_repetition_penalty_forbids(lm, prompts):
    """A huge penalty never repeats a token while others are left."""
    tokens = sj.generate(
        lm,
        [prompts[1]],
        max_new_tokens=24,
        ignore_eos=True,
        repetition_penalty=1e6,
    ).tokens[0]
    used = [*prompts[1], *tokens]
    assert len(set(tokens)) == len(tokens)
    assert not set(prompts[1]) & set(tokens) or len(set(used)) > 100


def test_second_length_does_not_recompile(lm, token_ids):
    """Lengths in one bucket share a compilation."""
    sj.generate(lm, [token_ids(140)], max_new_tokens=20)
    for length in (141, 160, 190):
        out = sj.generate(lm, [token_ids(length)], max_new_tokens=29)
        assert out.stats.compile_seconds == 0


def test_blocks_are_counted(lm, token_ids):
    length, new = 640, 9
    out = sj.generate(lm, [token_ids(length)], max_new_tokens=new, ignore_eos=True)
    layers, heads = lm.config.num_layers, lm.config.num_kv_heads
    budget = lm.sparse.block_budget
    blocks = [position // 64 + 1 for position in range(length + new - 1)]
    scale = layers * heads
    prompt, later = blocks[:length], blocks[length:]
    assert out.stats.prefill_blocks == (
        scale * sum(min(b, budget) for b in prompt),
        scale * sum(prompt),
    )
    assert out.stats.decode_blocks == (
        scale * sum(min(b, budget) for b in later),
        scale * sum(later),
    )


@pytest.mark.slow
@pytest.mark.long  # jitted by the engine: `test_one_dispatch_gives_the_same_tokens`
def test_run_is_one_program(lm, prompts, greedy):
    """The public function can be jitted by the caller, prefill and loop together."""
    from sparda_jax.engine.call import Call
    from sparda_jax.inference.generate import generate_loop, pad_rows

    call = Call(lm, prompts, sj.GenerateConfig(max_new_tokens=24, ignore_eos=True))
    session = call.session
    padding = [[]] * (session.rows - call.batch)
    prompt = pad_rows([*call.rows, *padding], session.shapes.prompt)
    request = session.request(24)
    whole = jax.jit(
        functools.partial(
            generate_loop, settings=lm.settings, tile_size=session.shapes.tile
        )
    )
    state = whole(lm.model, session.state, prompt, request)
    assert np.asarray(state.tokens)[: call.batch, :24].tolist() == greedy.tokens


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 128), (128, 128), (129, 192), (193, 256), (1000, 1024), (1025, 1536)],
)
def test_buckets(length, expected):
    assert bucket(length, 128) == expected


@pytest.mark.parametrize("blocks", [1, 4, 5, 255, 256, 257, 288, 289, 2048, 2049, 4095])
def test_capacities_grow_by_a_half_and_by_an_eighth_where_they_are_large(blocks):
    capacity = capacity_blocks(blocks)
    assert capacity_blocks(capacity) == capacity
    most = (
        4 * blocks
        if blocks < 4
        else blocks * 3 / 2
        if blocks <= 256
        else blocks * 9 / 8
    )
    assert blocks <= capacity <= most


@pytest.mark.parametrize(
    ("platform", "memory", "prompt", "batch", "tile"),
    [
        ("cpu", None, 131072, 1, 256),
        ("gpu", None, 131072, 1, 1024),
        ("gpu", 16 * 10**9, 131072, 1, 1024),
        ("gpu", 30 * 10**9, 131072, 1, 2048),
        ("gpu", 60 * 10**9, 131072, 1, 4096),
        ("gpu", 60 * 10**9, 131072, 2, 4096),
        ("gpu", 60 * 10**9, 131072, 16, 4096),
        ("gpu", 60 * 10**9, 65536, 1, 2048),
        ("gpu", 60 * 10**9, 8192, 1, 1024),
        ("gpu", 60 * 10**9, 500, 1, 512),
    ],
)
def test_tiles_are_as_large_as_prompt_and_memory_allow(
    platform, memory, prompt, batch, tile
):
    shapes = plan_shapes(
        prompt,
        farthest_start=0,
        longest=prompt,
        max_new=1,
        tile_size=tile_tokens(platform, memory),
        block_size=64,
        batch=batch,
    )
    assert shapes.tile == tile and shapes.capacity > prompt
    assert shapes.by_row == (prompt > 1024 or platform == "cpu")


@pytest.mark.parametrize(("batch", "tile"), [(1, 4096), (2, 2048), (16, 1024)])
def test_rows_that_are_prefilled_together_share_the_tokens_of_a_tile(batch, tile):
    shapes = plan_shapes(
        131072,
        farthest_start=0,
        longest=131072,
        max_new=1,
        tile_size=tile_tokens("gpu", 60 * 10**9),
        block_size=64,
        batch=batch,
        by_row=False,
    )
    assert shapes.tile == tile


def test_capacity_holds_whole_tiles_behind_the_farthest_start():
    shapes = plan_shapes(
        100, farthest_start=1000, longest=1100, max_new=5, tile_size=64, block_size=64
    )
    assert shapes.capacity >= 1000 + 128
    assert shapes.capacity % 64 == 0


def test_a_short_answer_has_the_programs_of_a_long_one():
    """A task's prompt is as long as its answer leaves room for (`sparda eval`)."""
    short, long = (
        plan_shapes(
            16384 - new,
            farthest_start=0,
            longest=16384 - new,
            max_new=new,
            tile_size=4096,
            block_size=64,
        )
        for new in (12, 128)
    )
    assert short == long and long.capacity == 16384


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "text"}, "prompts must be a list"),
        ({"prompts": [[]]}, r"prompts\[0\] is empty"),
        ({"prompts": [[5], [500]]}, r"prompts\[1\] holds token id 500"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"prompts": [np.array([0.5])]}, "integer token ids"),
        ({"prompts": ["words"]}, "has no tokenizer"),
        ({"prompts": [[5] * 4090]}, "at most 4096 fit the context"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": [1, 2]}, "seed has 2 values"),
        ({"stop_ids": [128]}, "stop_ids holds 128"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"prefill_chunk": 2, "single_call": True}, "with a prefill_chunk"),
    ],
)
def test_bad_input_names_field_and_value(lm, arguments, named):
    arguments = {"prompts": [[5, 6, 7]], "max_new_tokens": 8, **arguments}
    with pytest.raises(ConfigError, match=named):
        sj.generate(lm, **arguments)


def test_conversation_of_another_batch_is_refused(lm, prompts, greedy):
    with pytest.raises(ConfigError, match="the conversation has 3"):
        sj.generate(lm, prompts[:2], conversation=greedy.conversation)
