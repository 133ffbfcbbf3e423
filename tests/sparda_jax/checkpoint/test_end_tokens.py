"""Every token that a model ends an answer with, though its file names fewer."""

import pytest

from sparda_jax.checkpoint.end_tokens import end_tokens
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.cli.main import main

NORMAL, CONTROL, USER = 1, 3, 4


@pytest.mark.parametrize(
    ("tokens", "named", "wanted"),
    [
        # Qwen2.5-Coder: the file names the end of a turn alone.
        (
            {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL},
            [2, None, None],
            [2, 0],
        ),
        (
            {"<|endoftext|>": CONTROL, "<|im_end|>": CONTROL}
            | {"<|fim_middle|>": CONTROL, "<|fim_pad|>": CONTROL}
            | {"<|repo_name|>": CONTROL, "<|file_sep|>": CONTROL},
            [1],
            [1, 0, 3, 4, 5],
        ),
        # Llama 3: the file names the end of a text alone.
        (
            {"<|begin_of_text|>": CONTROL, "<|end_of_text|>": CONTROL}
            | {"<|eom_id|>": CONTROL, "<|eot_id|>": CONTROL},
            [1],
            [1, 2, 3],
        ),
        # Files exist whose control tokens are typed as text, or as the user's own.
        ({"a": NORMAL, "<|eot_id|>": NORMAL}, [None], [1]),
        ({"<|im_end|>": USER}, [], [0]),
        # What could be text is text, unless the file says otherwise.
        ({"</s>": NORMAL, "<EOT>": NORMAL, "[EOS]": NORMAL}, [None], []),
        ({"</s>": CONTROL, "<EOT>": CONTROL, "[EOS]": USER}, [], [0, 1, 2]),
        ({"<|end|>": CONTROL, "a": NORMAL}, [], [0]),
        ({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, [], [1, 2]),
        ({"a": NORMAL, "b": NORMAL}, [1, 1, 0], [1, 0]),
        ({}, [], []),
    ],
)
def test_end_tokens(tokens, named, wanted):
    assert end_tokens(list(tokens), list(tokens.values()), named) == wanted


def _write(kit, specials, eos, **metadata):
    """The small model with other names for its special tokens."""
    values = kit.metadata(kit.config)
    values["tokenizer.ggml.tokens"][: len(specials)] = specials
    values |= {"tokenizer.ggml.eos_token_id": eos} | metadata
    tensors = kit.tensors(kit.config)
    return kit.write_gguf(values, kit.gguf_tensors(kit.config, tensors, permute=True))


def test_the_model_of_a_file_ends_with_them(kit, capsys):
    """They reach what generation stops at, and are shown with name and id.

    All of them, not the one that metadata names (tt-inference-server#3452 in the list
    of public reports, whose text was not to be had).
    """
    path = _write(kit, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], 1)
    source = open_checkpoint(path)
    assert source.config.eos_ids == source.tokenizer.eos_ids == (1, 2)
    assert main(["models", "--model", str(path)]) == 0
    out = capsys.readouterr().out
    assert "ends with        1 '<|end_of_text|>', 2 '<|eot_id|>'\n" in out
    assert "begins with      none\n" in out
    assert "parameters       27,072\n" in out


def test_named_insertion_tokens_count(kit):
    path = _write(
        kit,
        ["<pad>", "<end>", "<sep>"],
        1,
        **{"tokenizer.ggml.fim_sep_token_id": 2, "tokenizer.ggml.eot_token_id": 1},
    )
    assert open_checkpoint(path).config.eos_ids == (1, 2)


def test_models_of_a_file_that_is_none(capsys, tmp_path):
    assert main(["models", "--model", str(tmp_path / "x.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
