"""The tokenizer of a Hugging Face directory."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from sparda_jax.checkpoint.errors import CheckpointError, UnsupportedTokenizer, show
from sparda_jax.checkpoint.files import is_file, parse_json, read_json, read_text
from sparda_jax.checkpoint.tokenizer import Tokenizer, failed_inside
from sparda_jax.checkpoint.tokenizers.check import check_tokenizer, unique_keys

_MAX_TEMPLATE = 1 << 20  # Bytes; the longest templates in use have 30,000.
_MAX_TOKENIZER = 1 << 28  # The largest tokenizer.json in use has about 40 MB.
_TOOL_USE = "tool_use"
# Variables of chat templates that tokenizer_config.json defines.
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def _token_text(value: object) -> str | None:
    """The text of a token in tokenizer_config.json: a string, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _directory_templates(
    directory: pathlib.Path, settings: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """The chat template, and the one for conversations with tools if it is another."""
    found = settings.get("chat_template")
    named = {"default": found}
    if isinstance(found, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in found
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
    for template in named.values():
        if template is not None and not isinstance(template, str):
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: chat_template = "
                f"{show(template)}, allowed: a string, or a list with one named "
                "'default'"
            )
    text = read_text(directory / "chat_template.jinja", _MAX_TEMPLATE)
    if text is not None:
        # Files beside each other stand for the whole list of tokenizer_config.json.
        place = directory / "additional_chat_templates" / f"{_TOOL_USE}.jinja"
        return text, read_text(place, _MAX_TEMPLATE)
    return named.get("default"), named.get(_TOOL_USE)


def _token_ids(path: pathlib.Path, field: str, value: object) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(
                f"{path}: {field} = {show(value)}, allowed: a token id or a list of ids"
            )
    return ids


def eos_ids_of(directory: pathlib.Path, config: Mapping[str, Any]) -> list[int]:
    """End tokens that a directory names, generation_config.json before config.json."""
    generation = directory / "generation_config.json"
    for path, values in (
        (generation, read_json(generation) or {}),
        (directory / "config.json", config),
    ):
        if values.get("eos_token_id") is not None:
            return _token_ids(path, "eos_token_id", values["eos_token_id"])
    return []


def _refuse_others(directory: pathlib.Path) -> None:
    """Says what to do about tokenizers in other files than tokenizer.json."""
    for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"):
        if is_file(directory / name):
            raise UnsupportedTokenizer(
                f"{directory}: holds {name} but no tokenizer.json, which is needed; "
                "transformers makes it: AutoTokenizer.from_pretrained(directory)"
                ".save_pretrained(directory)"
            )


def _backend(path: pathlib.Path, text: str) -> tuple[tokenizers.Tokenizer, list[int]]:
    """The tokenizer, and the ids that it puts before a text of its own accord."""
    where = f"{path}: is no valid tokenizer"
    check_tokenizer(parse_json(text, where, unique_keys), str(path))
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        # Lengths are the caller's business; a file may carry those of its training.
        backend.no_truncation()
        backend.no_padding()
        return backend, backend.encode("a").ids[:1]
    except BaseException as error:
        if not failed_inside(error):
            raise
        raise CheckpointError(f"{where}: {error}") from error


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {name: _token_text(settings.get(name)) for name in _NAMES}
    return {name: text for name, text in found.items() if text is not None}


def tokenizer_from_directory(
    directory: str | os.PathLike, config: Mapping[str, Any]
) -> Tokenizer | None:
    """Builds the tokenizer of a Hugging Face directory.

    Args:
      directory: Holds tokenizer.json, and maybe tokenizer_config.json,
        chat_template.jinja and generation_config.json.
      config: Contents of its config.json.

    Returns:
      The tokenizer, None if there is none.

    Raises:
      UnsupportedTokenizer: It is of a kind that is not supported.
      CheckpointError: One of the files is damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / "tokenizer.json"
    text = read_text(path, _MAX_TOKENIZER)
    if text is None:
        _refuse_others(directory)
        return None
    settings = read_json(directory / "tokenizer_config.json") or {}
    backend, opening = _backend(path, text)
    bos_text = _token_text(settings.get("bos_token"))
    bos_id = None if bos_text is None else backend.token_to_id(bos_text)
    if bos_id is None and config.get("bos_token_id") is not None:
        found = _token_ids(
            directory / "config.json", "bos_token_id", config["bos_token_id"]
        )
        bos_id = found[0] if found else None
    chat_source, tool_source = _directory_templates(directory, settings)
    names = _names(settings)
    if "bos_token" in settings and bos_text is None:
        # The template must not see a token that the file says there is none of.
        names["bos_token"] = ""
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos_id is not None and opening == [bos_id]
    eos_ids = eos_ids_of(directory, config)
    eos_text = _token_text(settings.get("eos_token"))
    eos_id = None if eos_text is None else backend.token_to_id(eos_text)
    if eos_id is not None:
        # The template's own end of turn comes first: it is its `eos_token`.
        eos_ids = [eos_id, *eos_ids]
    return Tokenizer(
        backend,
        where=str(directory),
        eos_ids=eos_ids,
        bos_id=bos_id,
        add_bos=add_bos,
        chat_source=chat_source,
        tool_source=tool_source,
        names=names,
    )
