"""Which tokens of a GGUF file end an answer.

A file names at most one end of text, one end of turn and one end of message, and many
name fewer than the model writes: Qwen2.5-Coder ends an insertion with `<|endoftext|>`
and a turn with `<|im_end|>`, Llama 3 a turn with `<|eot_id|>` and a text with
`<|end_of_text|>`. So tokens that are known ends are collected by their names as well,
as other readers of these files do.
"""

from collections.abc import Iterable, Sequence

# Names that nobody writes by accident: ends, whatever type the file gives them.
_UNMISTAKABLE = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
    }
)
# Names that could be text: ends if the file says that they are no plain text. The last
# ones end an insertion into code, where the next file would begin.
_SPECIAL_ONLY = frozenset(
    {
        "</s>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|fim_pad|>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<|file_sep|>",
    }
)
_CONTROL, _USER_DEFINED = 3, 4  # Token types of GGUF.


def end_tokens(
    tokens: Sequence[str], kinds: Iterable[object], named: Iterable[int | None]
) -> list[int]:
    """Ids of the tokens that end an answer, those the file names first.

    Args:
      tokens: Every token's own string.
      kinds: Every token's type, as GGUF numbers them.
      named: Ids that the file names, None for what it does not.
    """
    found = [token_id for token_id in named if token_id is not None]
    special = {}
    for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        marked = kind in (_CONTROL, _USER_DEFINED)
        if token in _UNMISTAKABLE or (marked and token in _SPECIAL_ONLY):
            special[token] = token_id
    # Where an answer ends with <|return|> or <|call|>, <|end|> only ends a part of it.
    if {"<|return|>", "<|call|>"} <= special.keys():
        special.pop("<|end|>", None)
    return list(dict.fromkeys([*found, *special.values()]))
