"""SmolLM2-135M at 4k on one GPU: the run behind the published Forecast weights."""

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
        name="smollm2-gpu",
        model="smollm2-135m",
        out="out/smollm2_distill_gpu",
        sparse=SparseConfig(local_blocks=4, block_budget=16),
        # 64 blocks a sequence, of which 16 are read: masking beats visiting lists.
        attention="masked",
        loss=LossConfig(mask_short_rows=True, floor=0.0),
        optimizer=OptimizerConfig(
            lr=1e-3,
            schedule="cosine",
            warmup_steps=20,
            final_fraction=0.05,
            steps=400,
            global_batch=8,
            micro_batch=8,
        ),
        data=DataConfig(
            sources=(("stdlib", 0.6), ("pydoc", 0.4)), seq_len=4096, packing="long"
        ),
        eval=EvalConfig(every=100, batches=16),
        checkpoint=CheckpointConfig(every=100),
    )
