"""NOSA-8B at 32k with the reference's values; give the weights with `--set`.

    python -m train.main --config configs/nosa_distill.py \
        --set model=PATH "data.sources=[('PATH_OF_TEXT', 1.0)]"
"""

import dataclasses
import pathlib

from train.config import TrainConfig, load_config


def get_config() -> TrainConfig:
    """The run: MiniCPM4.1's, at half its length."""
    folder = pathlib.Path(__file__).parent
    minicpm = load_config(folder / "minicpm4_distill.py")
    return dataclasses.replace(
        minicpm,
        name="nosa-8b",
        model="nosa-8b",
        out="out/nosa_distill",
        data=dataclasses.replace(minicpm.data, seq_len=32768),
    )
