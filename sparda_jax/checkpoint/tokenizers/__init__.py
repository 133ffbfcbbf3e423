"""Tokenizers as files describe them: GGUF metadata, tokenizer.json and its neighbours.

`directory` and `gguf` build a `checkpoint.tokenizer.Tokenizer`; the other modules are
theirs: families of pre-tokenizers, SentencePiece merges, checks before a file reaches
native code, and the text of one answer as its tokens come.
"""
