"""SmolLM2-135M at 4k on one GPU: the run behind the published Forecast weights.

The text is the manual and the library of the running Python: nothing to download.
"""

from train.config import (
    PUBLISHED_LOSS,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        name="smollm2-gpu",
        model="smollm2-135m",
        out="out/smollm2_distill_gpu",
        # Geometry and budget are the preset's: windows of 8 keys, 16 blocks.
        sparse=None,
        init="regression",
        init_batches=24,
        # 64 blocks a sequence, of which 16 are read: masking beats visiting lists.
        attention="masked",
        # The model was not trained with sparse attention. It is the deployed choice of
        # blocks that is learned, as inference pools it, in the rows that choose at all.
        loss=PUBLISHED_LOSS,
        optimizer=OptimizerConfig(
            lr=2e-4,
            schedule="cosine",
            warmup_steps=10,
            final_fraction=0.05,
            steps=160,
            global_batch=8,
            micro_batch=8,
        ),
        data=DataConfig(
            sources=(("stdlib", 0.85), ("pydoc", 0.15)),
            seq_len=4096,
            packing="joined",
            held_out=0.1,
        ),
        eval=EvalConfig(every=40, batches=16),
        checkpoint=CheckpointConfig(every=40),
        export_dtype="bfloat16",
    )
