"""SentencePiece BPE from pieces and scores, as GGUF files of llama models hold it."""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

_SPACE = "▁"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def merges_of(
    pieces: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool]
) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece merges them.

    It joins the two neighbours whose piece has the highest score. So every piece is
    split in all ways into two pieces, and the pairs are put in the order of scores.

    Args:
      pieces: The pieces by id.
      scores: Their scores.
      mergeable: Which of them text may become: not control tokens nor bytes.

    Returns:
      Pairs, the first to be merged first.
    """
    ids = {
        piece: number
        for number, (piece, can) in enumerate(zip(pieces, mergeable, strict=True))
        if can
    }
    ranked = []
    for piece, number in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[number], number, left, right))
    ranked.sort()
    return [(pieces[left], pieces[right]) for _, _, left, right in ranked]


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    mergeable: Sequence[bool],
    *,
    unknown: str | None,
    add_space_prefix: bool,
) -> tokenizers.Tokenizer:
    """Builds the tokenizer.

    Args:
      pieces, scores, mergeable: As in `merges_of`.
      unknown: The piece for what no piece stands for, None if there is none.
      add_space_prefix: Put a space before a text and after a special token.

    Returns:
      The tokenizer, without special tokens.
    """
    vocab = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(
        vocab,
        merges_of(pieces, scores, mergeable),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=vocab.keys() >= _BYTES,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    parts = [normalizers.Prepend(_SPACE), spaces] if add_space_prefix else [spaces]
    backend.normalizer = normalizers.Sequence(parts)
    after: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if add_space_prefix:
        after.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(after)
    return backend
