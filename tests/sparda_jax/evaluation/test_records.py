"""Documents of records: repeatable, every look-up true, none of the tasks' words."""

import hashlib
import re

import numpy as np
import pytest

from sparda_jax.checks import ConfigError
from sparda_jax.evaluation import passkey
from sparda_jax.evaluation.documents import is_held_out, read_documents
from sparda_jax.evaluation.records import (
    DOCUMENTS,
    make_document,
    record_documents,
    records_seed,
)
from sparda_jax.evaluation.tasks import conversations, needles, retrieval, tracing


@pytest.fixture(scope="module")
def documents():
    return [make_document(0, index) for index in range(12)]


@pytest.fixture(scope="module")
def texts():
    return list(record_documents(0))


def test_the_text_is_that_of_its_seed(documents, texts):
    assert len(texts) == DOCUMENTS == len(set(texts))
    assert texts[:12] == [one.text for one in documents]
    assert list(read_documents("records"))[:2] == texts[:2]
    assert next(read_documents("records:0")) == texts[0]
    assert next(read_documents("records:1")) not in texts
    # What the published recipe saw: a change of the generator changes the text.
    digest = hashlib.sha256("".join(texts[:4]).encode()).hexdigest()
    assert digest.startswith("043ae4e455138662"), digest


def test_every_lookup_is_told_before(documents):
    for one in documents:
        assert 30_000 <= len(one.text) < 75_000 and one.text.isascii()
        places = [look.answered for look in one.lookups]
        assert places == sorted(places)
        for look in one.lookups:
            assert look.told + len(look.text) <= look.answered
            for place in (look.told, look.answered):
                assert one.text[place : place + len(look.text)] == look.text


def test_many_characters_retrieve_and_far_back(documents):
    for one in documents:
        assert sum(len(look.text) for look in one.lookups) > 0.08 * len(one.text)
        far = [look for look in one.lookups if look.answered - look.told > 4000]
        assert len(far) > 0.25 * len(one.lookups)


def test_a_key_or_value_stands_for_one_record(documents):
    for one in documents:
        told = {}
        for look in one.lookups:
            assert told.setdefault(look.text, look.told) == look.told


def test_the_split_sees_documents_apart(texts):
    sides = [
        is_held_out(np.frombuffer(text[:256].encode(), np.uint8), 0.1, 42)
        for text in texts
    ]
    assert 0 < sum(sides) < DOCUMENTS // 4


def _strings(value):
    """All texts that a module's constants hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        yield from _strings(tuple(value.items()))


def _task_phrases():
    """Runs of three words of the sentences that evaluation tasks are made of."""
    found = set()
    for module in (needles, retrieval, tracing, conversations, passkey):
        for name, value in vars(module).items():
            if name.startswith("__"):
                continue
            for text in _strings(value):
                for part in re.split(r"\{[^}]*\}|[.?!:\n]", text):
                    words = part.lower().split()
                    found |= {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}
    return found


def test_no_words_of_the_evaluation_are_in_it(texts):
    phrases = _task_phrases()
    # They are the sentences that are meant.
    assert {"special magic", "the special magic"} & phrases
    assert "the grass is" in phrases and "5-digit passkey number" in phrases
    whole = " ".join(" ".join(text.lower().split()) for text in texts)
    words = whole.split()
    seen = {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}
    assert not seen & phrases, sorted(seen & phrases)[:20]
    for word in ("magic", "passkey", "needle", "haystack", "quiz", "memorize"):
        assert word not in whole


@pytest.mark.parametrize(
    ("source", "seed"),
    [("records", 0), ("records:7", 7), ("records:4294967295", 4294967295)],
)
def test_seeds(source, seed):
    assert records_seed(source) == seed


@pytest.mark.parametrize("source", ["stdlib", "record", "recordsx", "./records:x"])
def test_other_sources(source):
    assert records_seed(source) is None


@pytest.mark.parametrize(
    "source", ["records:", "records:-1", "records:x", "records:4294967296", "records:²"]
)
def test_wrong_seeds_are_refused(source):
    with pytest.raises(ConfigError, match="'records:SEED' with a SEED from 0 to"):
        list(read_documents(source))
