"""What the sums between the devices of a mesh take, alone, one after the other."""

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparda_jax.config import ModelConfig


def measured_sums(config: "ModelConfig", devices: int, batch: int) -> float:
    """Seconds of a step's all-reduces alone: two a layer, of [batch, D].

    Args:
      config: The whole model.
      devices: That share a layer.
      batch: Rows.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from sparda_jax.mesh import MODEL, MeshConfig

    if devices == 1:
        return 0.0
    steps = 20

    def steps_of_sums(x):
        def one(_, x):
            # Scaled, so that sums of sums stay finite, and none can be left out.
            return jax.lax.psum(x, MODEL) * jnp.asarray(0.5, x.dtype)

        return jax.lax.fori_loop(0, steps * 2 * config.num_layers, one, x)

    run = jax.jit(
        jax.shard_map(
            steps_of_sums,
            mesh=MeshConfig(model=devices).devices,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    x = jnp.ones((batch, config.hidden_size), jnp.bfloat16)
    jax.block_until_ready(run(x))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append((time.perf_counter() - begun) / steps)
    return statistics.median(times)
