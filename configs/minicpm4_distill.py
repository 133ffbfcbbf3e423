"""MiniCPM4.1-8B at 64k with the reference's values; give the weights with `--set`.

    python -m train.main --config configs/minicpm4_distill.py \
        --set model=PATH "data.sources=[('PATH_OF_TEXT', 1.0)]"
"""

from train.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig


def get_config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        name="minicpm4.1-8b",
        model="minicpm4.1-8b",
        out="out/minicpm4_distill",
        dtype="bfloat16",
        # Block geometry and budget are the checkpoint's own.
        sparse=None,
        optimizer=OptimizerConfig(global_batch=32, micro_batch=1),
        data=DataConfig(seq_len=65536, packing="documents"),
        parallel=ParallelConfig(fsdp=True),
    )
