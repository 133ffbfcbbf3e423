"""Generators: lengths, depths, what is asked and where it stands; RULER's make-up."""

import collections
import json
import math
import random
import re
import sys

import pytest
from evaluation_cases import character_tokenizer

from sparda_jax.checks import ConfigError
from sparda_jax.cli.main import build_parser
from sparda_jax.evaluation import texts
from sparda_jax.evaluation.samples import Prompts, sample_of
from sparda_jax.evaluation.tasks import get_task, task_names
from sparda_jax.evaluation.tasks.documents import entries
from sparda_jax.evaluation.tasks.needles import NOISE
from sparda_jax.evaluation.tasks.retrieval import LATENT

LENGTH, SEED = 12_000, 42
# Tasks whose answer stands in the prompt once.
ONCE = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_style_single_2",
    "ruler_style_single_3",
    "ruler_style_multikey_1",
    "latent_needle",
)


def _samples(prompts, name, count=2, length=LENGTH):
    task = get_task(name)
    return task.samples(prompts, length=length, count=count, seed=SEED)


@pytest.mark.parametrize("name", task_names())
def test_lengths_fit_and_samples_depend_on_their_index_alone(prompts, name):
    task = get_task(name)
    two, one = _samples(prompts, name), _samples(prompts, name, 1)
    assert two[0] == one[0]
    assert two[0].input != two[1].input or two[0].questions != two[1].questions
    # The manual's entries on functions are long.
    least = 0.8 if name == "pydoc" else 0.93
    for sample in two:
        assert least * LENGTH < sample.length <= LENGTH
        assert prompts.longest(sample) + task.max_new_tokens == sample.length
        assert sample_of(json.loads(json.dumps(sample.row()))) == sample
    assert {
        "index",
        "input",
        "outputs",
        "length",
        "answer_prefix",
        "token_position_answer",
    } <= two[0].row().keys()


def test_tasks_that_need_the_extra_say_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
    texts.word_list.cache_clear()
    for name in task_names():
        task = get_task(name)
        try:
            task.build(random.Random(0), task.least, 4000, 0)
            needed = False
        except ConfigError as error:
            assert "wonderwords" in str(error)
            needed = True
        assert task.words == needed, name
    # What `sparda eval` runs if nothing is said does not need it.
    chosen = build_parser().parse_args(["eval"]).tasks
    assert chosen == ("passkey", "latent_needle", "pydoc")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["eval", "--help"])
    told = capsys.readouterr().out
    assert "* needs words: pip install 'sparda-jax[eval]'" in told
    assert "  niah_single_1 * " in told and "  passkey * " not in told


@pytest.mark.parametrize("name", ONCE)
def test_the_answer_stands_once_where_it_is_said_to(prompts, name):
    for sample in _samples(prompts, name):
        (answer,) = sample.outputs
        assert sample.input.count(answer) == 1
        place = sample.input.index(answer)
        # A token is a character here.
        assert abs(sample.token_position_answer - place) < 60
        if sample.depth is not None:
            assert abs(place / len(sample.input) - sample.depth) < 0.12


def test_a_length_without_room_is_refused(prompts):
    with pytest.raises(ConfigError, match=r"lengths=100 .*'vt' needs \d+ tokens"):
        _samples(prompts, "vt", length=100)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"tasks='nih' .* niah_single_1"):
        get_task("nih")


def test_niah_single_1(prompts):
    (sample,) = _samples(prompts, "niah_single_1", 1)
    head, *lines, question = sample.input.split("\n")
    assert head.startswith("A special magic number is hidden within")
    needles = [line for line in lines if line != NOISE]
    assert len(needles) == 1 and len(lines) > 90
    key = re.fullmatch(
        r"One of the special magic numbers for (\S+-.+) is: (\d{7})\.", needles[0]
    )
    assert key and key.group(2) == sample.outputs[0]
    assert question == (
        f"What is the special magic number for {key.group(1)} mentioned in the "
        "provided text?"
    )
    assert sample.answer_prefix == (
        f" The special magic number for {key.group(1)} mentioned in the provided text "
        "is"
    )
    assert get_task("niah_single_1").max_new_tokens == 128


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("niah_multikey_2", r"One of the special magic numbers for .+ is: \d{7}\."),
        (
            "niah_multikey_3",
            r"One of the special magic uuids for [0-9a-f-]{36} is: [0-9a-f-]{36}\.",
        ),
    ],
)
def test_haystacks_of_needles(prompts, name, form):
    (sample,) = _samples(prompts, name, 1)
    lines = sample.input.split("\n")[1:-1]
    assert len(lines) > 60
    assert all(re.fullmatch(form, line) for line in lines)


@pytest.mark.parametrize(
    ("name", "needles", "answers"),
    [
        ("ruler_style_single_2", 1, 1),
        ("ruler_style_single_3", 1, 1),
        ("ruler_style_multikey_1", 4, 1),
        ("ruler_style_multivalue", 4, 4),
        ("ruler_style_multiquery", 4, 4),
    ],
)
def test_needles_in_the_manual(prompts, name, needles, answers):
    (sample,) = _samples(prompts, name, 1)
    assert sample.input.count("One of the special magic") == needles
    assert len(sample.outputs) == answers
    for answer in sample.outputs:
        assert sample.input.count(answer) == 1
    asked = sample.input.rsplit(" for ", 1)[1].removesuffix(
        " mentioned in the provided text?"
    )
    names = re.split(r", and |, ", asked)
    assert len(names) == (4 if name.endswith("multiquery") else 1)
    assert all(sample.input.count(f" for {key} is: ") for key in names)


def test_variable_tracking(prompts):
    (sample,) = _samples(prompts, "vt", 1)
    example, question = sample.input.split("\n\n\n\n")
    value = question.rsplit("value ", 1)[1].split()[0]
    links = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})", question)
    assert [name for name, _ in links] == list(sample.outputs)
    assert [before for _, before in links] == [value, *sample.outputs[:-1]]
    assert len(sample.outputs) == 5
    names = re.findall(r"VAR (\w{3}) =", example)
    assert example.endswith(f"they are: {' '.join(names)}")
    assert sample.answer_prefix.endswith(f"assgined the value {value}, they are: ")
    assert get_task("vt").max_new_tokens == 30


@pytest.mark.parametrize(("length", "common", "others"), [(3000, 6, 1), (9000, 30, 3)])
def test_common_words(prompts, length, common, others):
    (sample,) = _samples(prompts, "cwe", 1, length)
    listed = sample.input.rsplit("\nQuestion:", 1)[0].rsplit("\n", 1)[1]
    words = re.findall(r"\d+\. (.+?)(?= \d+\.|$)", listed)
    counts = collections.Counter(words)
    assert {counts[word] for word in sample.outputs} == {common}
    assert {n for w, n in counts.items() if w not in sample.outputs} == {others}
    assert len(sample.outputs) == 10 and get_task("cwe").max_new_tokens == 120


def test_frequent_words(prompts):
    (sample,) = _samples(prompts, "fwe", 1)
    text = sample.input.split("coded words. ", 1)[1].split("\nQuestion:")[0]
    ranked = collections.Counter(text.split()).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.outputs
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    # Frequencies fall as the ranks' squares.
    first = ranked[0][1] * math.pi**2 / 6
    for rank, (_, count) in enumerate(ranked[:10], 1):
        share = ranked[0][1] / rank**2
        assert abs(count - share) <= 1 + first / 100
    assert get_task("fwe").max_new_tokens == 50


def test_needles_share_no_word_with_their_question():
    for needle, question in LATENT:
        asked = set(re.findall(r"\w+", question.lower()))
        told = set(re.findall(r"\w+", needle.format(name="").lower()))
        assert not asked & told - {"a", "an"}, question
        stems = {word[:4] for word in asked if len(word) > 4}
        assert not stems & {word[:4] for word in told}, question


@pytest.mark.parametrize("alike", [2, 4, 8])
def test_mrcr_asks_for_the_ith_of_equal_requests(prompts, alike):
    for sample in _samples(prompts, f"mrcr_style_{alike}"):
        prefix, wanted = sample.outputs
        said = [text for role, text in sample.history if role == "user"]
        request, count = collections.Counter(said).most_common(1)[0]
        what, about = (
            request.removeprefix("Write a ").removesuffix(".").split(" about ")
        )
        request = f"Write a {what} about {about}."
        if f"{what} about {about} that you wrote" not in sample.input:
            asked = re.search(r"(\w+) about (\w+) that", sample.input)
            request = f"Write a {asked.group(1)} about {asked.group(2)}."
        turns = list(zip(sample.history[::2], sample.history[1::2], strict=True))
        answers = [text for (_, r), (_, text) in turns if r == request]
        assert len(answers) == alike <= count or count >= alike
        ordinals = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
        number = answers.index(wanted)
        word = (*ordinals, "eighth")[number]
        assert f"the {word} " in sample.input and prefix in sample.input


def test_extraction_tells_every_field_once_and_those_of_another(prompts):
    (sample,) = _samples(prompts, "extract_json", 1)
    record = json.loads(sample.outputs[0])
    place = re.search(r"all that the text says of the house of (\w+)", sample.input)
    told = re.findall(rf"The house of {place.group(1)} ([^.]*)\.", sample.input)
    assert len(told) == len(record) == 10
    for value in record.values():
        assert any(str(value) in text for text in told)
    assert len(re.findall(r"The house of \w+ ", sample.input)) == 20


def test_pydoc_questions_have_one_answer(prompts):
    names = [name for name, _, _ in entries()]
    assert len(set(names)) == len(names) > 300
    (sample,) = _samples(prompts, "pydoc", 1)
    line = re.search("“(.*)”", sample.input).group(1)
    known = {first: name for name, first, _ in entries()}
    assert (known[line],) == sample.outputs
    # Its name does not stand in the question.
    assert sample.outputs[0] not in sample.input.rsplit("\n\n", 1)[1]


def test_several_questions_share_their_context(prompts):
    (sample,) = _samples(prompts, "retr_kv", 1)
    rows = prompts.all_ids(sample)
    pairs = json.loads(sample.input.split("\n\n", 1)[1])
    assert len(rows) == len(sample.questions) == 5
    for question in sample.questions:
        key = re.search('"(.+?)"', question.input).group(1)
        assert question.outputs == (pairs[key],)
    shared = len(prompts.text_ids(sample.input))
    assert len({tuple(row[:shared]) for row in rows}) == 1


def test_answer_prefix_stands_behind_the_chat_template(tiny_config):
    tokenizer = character_tokenizer(chat=True)
    sample = _samples(Prompts(tokenizer, tiny_config), "passkey", 1, 3000)[0]
    ids = Prompts(tokenizer, tiny_config).ids(sample)
    text = tokenizer.decode(ids, skip_special=False)
    assert text.endswith(f"<|end|><|assistant|>{sample.answer_prefix}")
    assert sample.length == len(ids) + 12
