"""NOSA-8B at 32k with the reference's values; give the weights with `--set`.

    python -m train.main --config configs/nosa_distill.py \
        --set model=PATH "data.sources=[('PATH_OF_TEXT', 1.0)]"
"""

from train.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        name="nosa-8b",
        model="nosa-8b",
        out="out/nosa_distill",
        dtype="bfloat16",
        sparse=None,
        optimizer=OptimizerConfig(global_batch=32, micro_batch=1),
        data=DataConfig(seq_len=32768, packing="documents"),
        parallel=ParallelConfig(fsdp=True),
    )
