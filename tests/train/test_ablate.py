"""The comparison of variants trains as the trainer does, and tells what it knows."""

import json
import textwrap

import numpy as np
import pytest

from sparda_jax.checkpoint.hf import read_safetensors
from train.ablate import main
from train.config import load_config
from train.run import train
from train.text import Corpus, save_corpus

CONFIG = """
    from sparda_jax.config import SparseConfig
    from train.config import *

    def get_config():
        return TrainConfig(
            model="tiny",
            out={out!r},
            sparse=SparseConfig(local_blocks=1, block_budget=4),
            loss=LossConfig(mask_short_rows=True, tile=256),
            optimizer=OptimizerConfig(lr=5e-3, steps=3, global_batch=1),
            data=DataConfig(
                sources=(({data!r}, 1.0),), seq_len=512, packing="long", held_out=0.3
            ),
            eval=EvalConfig(every=3, batches=1, mass=False),
            checkpoint=CheckpointConfig(every=3),
        )
"""


@pytest.fixture
def config(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 128, 16_000).astype(np.uint32)
    ends = np.arange(800, 16_001, 800)
    save_corpus(Corpus("x", (tokens,), (ends,), 128), tmp_path / "data")
    values = {"out": str(tmp_path / "run"), "data": str(tmp_path / "data")}
    path = tmp_path / "config.py"
    path.write_text(textwrap.dedent(CONFIG).format(**values))
    return path


@pytest.mark.slow
def test_a_variant_is_what_the_trainer_makes(config, tmp_path, capsys):
    out = tmp_path / "ablation.json"
    names = ["ours", "ours, from_query", "reference, short rows masked"]
    arguments = ["--config", str(config), "--steps", "3", "--out", str(out)]
    assert main([*arguments, "--only", *names, "--save", "ours"]) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert list(found["variants"]) == ["untrained, from_query", *names]
    assert len(found["variants"]["ours"]["layers"]["recall"]) == 3
    # One changes the learning rate alone, the other nothing but the rate.
    losses = [found["variants"][name]["loss"] for name in names]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[2], rel=1e-6)
    result = train(load_config(config), progress=False)
    saved = read_safetensors(tmp_path / "run" / "ours.safetensors")[0]
    whole = read_safetensors(result.forecast)[0]
    for name, load in whole.items():
        np.testing.assert_allclose(load(), saved[name](), rtol=1e-5, atol=1e-6)


def test_unknown_variants_are_named(config, capsys):
    assert main(["--config", str(config), "--only", "theirs"]) == 2
    assert "--only='theirs' is not allowed" in capsys.readouterr().err
