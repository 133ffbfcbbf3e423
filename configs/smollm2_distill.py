"""SmolLM2-135M on a CPU: short sequences, few steps, text that every Python has.

About a quarter of an hour on two cores.
"""

from sparda_jax.config import SparseConfig
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        name="smollm2-cpu",
        model="smollm2-135m",
        out="out/smollm2_distill",
        # A sequence of 2048 tokens has 32 blocks, half of which fit the budget.
        sparse=SparseConfig(local_blocks=4, block_budget=16),
        # The model was not trained with sparse attention, and most rows of a short
        # sequence need no choice: they are left out.
        loss=LossConfig(mask_short_rows=True, floor=0.0),
        optimizer=OptimizerConfig(
            lr=1e-3,
            schedule="cosine",
            warmup_steps=5,
            final_fraction=0.1,
            steps=60,
            global_batch=1,
        ),
        data=DataConfig(
            sources=(("stdlib", 0.6), ("pydoc", 0.4)), seq_len=2048, packing="long"
        ),
        eval=EvalConfig(every=30, batches=4),
        checkpoint=CheckpointConfig(every=30),
    )
