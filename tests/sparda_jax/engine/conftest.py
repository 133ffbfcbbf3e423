"""The tiny model that takes text."""

from text_model import text_lm, text_tokenizer

__all__ = ["text_lm", "text_tokenizer"]
