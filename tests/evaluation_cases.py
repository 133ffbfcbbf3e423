"""A tokenizer of single characters, with and without a chat template; fine blocks."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.config import SparseConfig

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
FINE = SparseConfig(
    kernel_size=4,
    kernel_stride=2,
    block_size=4,
    init_blocks=1,
    local_blocks=1,
    block_budget=5,
)


def character_tokenizer(chat: bool = False) -> Tokenizer:
    """One token a byte of ASCII, in 128 ids: what `tiny` has weights for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_only = [c for c in alphabet if 0x21 <= ord(c) < 0x7F] + ["Ġ", "Ċ", "ĉ"]
    vocab = {character: n for n, character in enumerate(ascii_only, 2)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    if chat:
        backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, where="test", chat_source=CHATML if chat else None)
