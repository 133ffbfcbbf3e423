"""Models that are split into several GGUF files."""

import numpy as np
import pytest

from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.source import open_checkpoint


def _split(kit, count, changes=None):
    """A model in `count` files, the metadata in the first one; paths in order."""
    tensors = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    names = sorted(tensors)
    paths = []
    for number in range(count):
        held = names[number::count]
        metadata = kit.metadata(kit.config) if number == 0 else {}
        metadata |= {"split.no": number, "split.count": count}
        metadata["split.tensors.count"] = len(names)
        metadata |= (changes or {}).get(number, {})
        paths.append(
            kit.write_gguf(
                metadata,
                {name: tensors[name] for name in held},
                name=f"big-{number + 1:05d}-of-{count:05d}.gguf",
            )
        )
    return paths


def test_split_files_are_one_model(kit):
    paths = _split(kit, 3)
    whole = open_checkpoint(kit.tiny_gguf())
    for path in paths:
        source = open_checkpoint(path)
        assert source.config == whole.config
        assert source.fingerprint == whole.fingerprint
        assert source.tokenizer.encode("hello") == whole.tokenizer.encode("hello")
    loaded = open_checkpoint(paths[0]).load()
    for name, array in whole.load().items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: {"split.count": 3}}, "00002-of-00002.gguf: GGUF split.count = 3"),
        ({1: {"split.no": 0}}, "00002-of-00002.gguf: GGUF split.no = 0, allowed: 1"),
        ({0: {"split.count": -1}}, "split.count = -1"),
        ({0: {"split.count": True}}, "split.count = True"),
        ({0: {"split.count": 9}}, "split.count = 9, .*NAME-00001-of-00009.gguf"),
        ({0: {"split.tensors.count": 5}}, "split.tensors.count = 5, allowed: 20"),
    ],
)
def test_split_files_that_do_not_fit(kit, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(_split(kit, 2, changes)[0])


def test_split_files_missing_or_mixed_up(kit):
    paths = _split(kit, 2)
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"split\.no = 1, allowed: 0 in part 1"):
        open_checkpoint(paths[1])
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*is missing.*part 1 of"):
        open_checkpoint(paths[1])
    first = _split(kit, 2)[0]
    twice = {"split.no": 1, "split.count": 2}
    held = kit.gguf_tensors(kit.config, kit.tensors(kit.config), permute=True)
    kit.write_gguf(twice, held, name=paths[1].name)
    with pytest.raises(CheckpointError, match=r"is in big-00001-of-00002\.gguf as"):
        open_checkpoint(first)
