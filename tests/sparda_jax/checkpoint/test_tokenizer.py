import json
import threading

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.source import open_checkpoint
from sparda_jax.checkpoint.tokenizer import Tokenizer
from sparda_jax.checkpoint.tokenizers.directory import tokenizer_from_directory


@pytest.fixture(scope="module")
def tokenizer(session_kit) -> Tokenizer:
    return open_checkpoint(session_kit.tiny_gguf()).tokenizer


def _pre(kit, name):
    metadata = kit.metadata(kit.config) | {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.add_bos_token": None,
    }
    tensors = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    return open_checkpoint(kit.write_gguf(metadata, tensors)).tokenizer


def test_merges_and_digits(tokenizer):
    ids = tokenizer.encode("hello w12")
    assert [tokenizer.token(n) for n in ids] == ["hello", "Ġw", "1", "2"]
    assert tokenizer.decode(ids) == "hello w12"
    assert tokenizer.encode("") == []


def test_special_tokens_are_text_unless_asked_for(tokenizer):
    text = "<|im_start|>hello<|im_end|>"
    plain = tokenizer.encode(text)
    parsed = tokenizer.encode(text, special=True)
    assert not {0, 1, 2} & set(plain)
    assert tokenizer.decode(plain) == text
    assert parsed == [1, tokenizer.token_id("hello"), 2]
    assert tokenizer.decode(parsed) == "hello"
    assert tokenizer.decode(parsed, skip_special=False) == text
    assert tokenizer.encode(text) == plain


def test_encode_from_threads(tokenizer):
    """The switch for special tokens belongs to the call."""
    wrong = []

    def work(special: bool) -> None:
        for _ in range(200):
            ids = tokenizer.encode("<|im_end|>", special=special)
            if (ids == [2]) != special:
                wrong.append(ids)

    threads = [
        threading.Thread(target=work, args=(special,)) for special in (True, False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
    ],
)
def test_digit_groups(kit, name, groups):
    backend = _pre(kit, name)._backend
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("1234")]
    assert pieces == groups


def test_families(kit):
    """Qwen composes characters first; Llama 3 takes a word that is a token whole."""
    decomposed = "e\u0301"
    qwen = _pre(kit, "qwen2")
    assert qwen.decode(qwen.encode(decomposed)) == "\u00e9"
    llama = _pre(kit, "llama-bpe")
    assert llama.decode(llama.encode(decomposed)) == decomposed
    assert llama.add_bos and llama.bos_id == 1
    assert not qwen.add_bos
    # One space before a word belongs to it, the others stay together.
    pieces = qwen._backend.pre_tokenizer.pre_tokenize_str("a   b'll\n\n c!")
    assert [p for p, _ in pieces] == ["a", "ĠĠ", "Ġb", "'ll", "ĊĊ", "Ġc", "!"]


def test_text_that_is_none(tokenizer):
    with pytest.raises(ValueError, match="valid Unicode"):
        tokenizer.encode("\ud800")


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@given(st.lists(st.integers(0, 264), max_size=30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_stream_joins_to_decode(tokenizer, ids, skip):
    """Also where the bytes are no UTF-8."""
    stream = tokenizer.stream(skip_special=skip)
    text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip)


def test_stream_gives_whole_characters(tokenizer):
    ids = tokenizer.encode("a€😀b")
    assert len(ids) == 9
    stream = tokenizer.stream()
    assert [stream.push(n) for n in ids] == ["a", "", "", "€", "", "", "", "😀", "b"]
    assert stream.flush() == ""
    stream.push(ids[1])
    assert stream.flush() == "\ufffd"


def test_unknown_ids_give_no_text(tokenizer):
    assert tokenizer.decode([10_000, *tokenizer.encode("hello")]) == "hello"
    assert tokenizer.stream().push(10_000) == ""


def _sentencepiece(path):
    """A tokenizer as Llama 2 and MiniCPM have it: spaces as ▁, bytes as <0xNN>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces += ["▁", "h", "i", "▁h", "▁hi"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁h", "i")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = [
        tokenizers.AddedToken(n, special=True, normalized=False) for n in pieces[:3]
    ]
    backend.add_special_tokens(specials)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    backend.save(str(path / "tokenizer.json"))


def test_directory(tmp_path):
    _sentencepiece(tmp_path)
    settings_ = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [
            {"name": "tools", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer = tokenizer_from_directory(tmp_path, {"eos_token_id": 7})
    assert tokenizer.eos_ids == (2, 5)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, True)
    assert tokenizer.chat([{"role": "user", "content": "x"}]) == "<s>x"
    # The beginning token is the caller's to add.
    assert tokenizer.encode("hi") == [tokenizer.token_id("▁hi")]
    ids = tokenizer.encode("hi hi é😀")
    assert tokenizer.decode(ids) == "hi hi é😀"
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == "hi hi é😀"
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:2] == ["hi", " hi"]
    (tmp_path / "chat_template.jinja").write_text("file")
    kept = settings_ | {"add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    tokenizer = tokenizer_from_directory(tmp_path, {})
    assert tokenizer.chat([{"role": "user", "content": "x"}]) == "file"
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)


def test_template_of_conversations_with_tools(tmp_path):
    _sentencepiece(tmp_path)
    settings = {
        "bos_token": None,
        "chat_template": [
            {"name": "default", "template": "plain{{ bos_token }}"},
            {"name": "tool_use", "template": "{{ tools[0].name }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    # An id that the model has is no token of the template if the file says none.
    tokenizer = tokenizer_from_directory(tmp_path, {"bos_token_id": 1})
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.chat(messages) == tokenizer.chat(messages, tools=None) == "plain"
    assert tokenizer.chat(messages, tools=[{"name": "hi"}]) == "hi"
    ids = tokenizer.encode_chat(messages, tools=[{"name": "hi"}])
    assert ids == tokenizer.encode("hi")
    # Files beside it replace the whole list.
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = tokenizer_from_directory(tmp_path, {})
    assert tokenizer.chat(messages, tools=[{"name": "hi"}]) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    place = tmp_path / "additional_chat_templates" / "tool_use.jinja"
    place.write_text("{{ tools|length }}")
    tokenizer = tokenizer_from_directory(tmp_path, {})
    assert tokenizer.chat(messages, tools=[1, 2]) == "2"
    assert tokenizer.chat(messages) == "file"


def test_window_stream_gives_up_on_endless_bytes(tmp_path):
    _sentencepiece(tmp_path)
    tokenizer = tokenizer_from_directory(tmp_path, {})
    stream = tokenizer.stream()
    byte = tokenizer.token_id("<0xFF>")
    assert any(stream.push(byte) for _ in range(20))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "no valid tokenizer"),
        ("tokenizer.json", '{"model": {"type": "BPE"', "no valid tokenizer"),
        ("tokenizer.json", "[" * 5000, "no valid tokenizer"),
        ("tokenizer_config.json", "[1]", "wanted a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template = 5"),
        ("tokenizer_config.json", "[" * 100_000, "no valid JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id = 'x'"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', "eos_token_id"),
        ("generation_config.json", "\ud800".encode("utf-8", "surrogatepass"), "JSON"),
    ],
)
def test_damaged_directory(tmp_path, name, content, message):
    _sentencepiece(tmp_path)
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as error:
        tokenizer_from_directory(tmp_path, {})
    assert name in str(error.value)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_damaged_tokenizer_json(session_kit, place, value):
    folder = session_kit.folder
    _sentencepiece(folder)
    raw = bytearray((folder / "tokenizer.json").read_bytes())
    raw[place % len(raw)] = value
    (folder / "tokenizer.json").write_bytes(raw)
    try:
        tokenizer = tokenizer_from_directory(folder, {})
    except CheckpointError:
        return
    tokenizer.decode(tokenizer.encode("hi"))


def test_no_chat_template(session_kit):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer = Tokenizer(backend, where="here")
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="here: the model has no chat template"):
        tokenizer.chat([{"role": "user", "content": "x"}])


@pytest.mark.network
def test_smollm2_goldens(smollm2_path, golden):
    """The golden's token ids, from its own text, and the template's prompt."""
    tokenizer = open_checkpoint(smollm2_path).tokenizer
    arrays = golden("smollm2_logits")
    for name in ("short", "chat", "long"):
        ids = arrays[f"{name}_ids"].tolist()
        text = tokenizer.decode(ids, skip_special=False)
        assert tokenizer.encode(text, special=True) == ids
        stream = tokenizer.stream(skip_special=False)
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert tokenizer.encode("The capital of France is") == (
        arrays["short_ids"].tolist()
    )
    prompt = tokenizer.chat([{"role": "user", "content": "What is gravity?"}])
    assert tokenizer.encode(prompt, special=True) == arrays["chat_ids"].tolist()
    assert tokenizer.has_chat_template
    # The end of a turn, and <|endoftext|>, which the file does not name.
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((2, 0), 1)
    assert not tokenizer.add_bos
    assert tokenizer.vocab_size == 49152
