"""Fixtures of the evaluation's tests."""

import pytest
from evaluation_cases import FINE, character_tokenizer

import sparda_jax as sj
from sparda_jax.config import ModelConfig
from sparda_jax.evaluation.samples import Prompts
from sparda_jax.models.presets import PRESETS


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return PRESETS["tiny"].model


@pytest.fixture(scope="session")
def fine_lm() -> sj.LanguageModel:
    """SparDA with blocks of four tokens: a few dozen tokens are many blocks."""
    return sj.load("tiny", attention="sparda", forecast="from_query", sparse=FINE)


@pytest.fixture(scope="session")
def prompts(tiny_config) -> Prompts:
    """Plain prompts: no template, a token a character."""
    return Prompts(character_tokenizer(), tiny_config)
