"""Replicas of `sparda serve` behind Ray Serve, as many as the waiting rows ask for.

    pip install 'sparda-jax[ray]'
    export SPARDA_SERVE_MODEL=smollm2-135m SPARDA_SERVE_MAX_CONTEXT=4096
    serve run --working-dir deploy ray_serve:app

Every option of `sparda serve` is its environment variable, and every replica a server
of its own: ours are the endpoints and the rows, Ray's are sockets, replicas and
restarts.
"""

import os
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

# Outputs that wait for a row, of all replicas, for which one more replica is started.
_WAITING_FOR_ONE_MORE = float(os.environ.get("SPARDA_RAY_WAITING", "4"))


def replicas_by_waiting(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as there are, and more where outputs wait for rows.

    One less where nobody waits and the rows that are taken fit the others. Ray keeps to
    the limits and the delays of the configuration.
    """

    def total(name: str) -> float:
        metrics = context.aggregated_metrics or {}
        return sum(metrics.get(name, {}).values())

    now, waiting = context.current_num_replicas, total("waiting")
    if waiting >= _WAITING_FOR_ONE_MORE:
        return now + 1, {}
    taken, rows = total("running"), total("rows")
    if now > 1 and not waiting and taken <= rows * (now - 1) / now:
        return now - 1, {}
    return now, {}


@serve.deployment(
    # What a replica takes at a time is for its scheduler to say, not for Ray's queue.
    max_ongoing_requests=1024,
    health_check_period_s=10,
    # As long as the longest request may take: a replica that goes finishes its own.
    graceful_shutdown_timeout_s=300,
    ray_actor_options={"num_gpus": float(os.environ.get("SPARDA_RAY_GPUS", "0"))},
    autoscaling_config=AutoscalingConfig(
        min_replicas=1,
        max_replicas=int(os.environ.get("SPARDA_RAY_REPLICAS", "4")),
        metrics_interval_s=1,
        look_back_period_s=2,
        upscale_delay_s=5,
        downscale_delay_s=300,
        policy=AutoscalingPolicy(policy_function=replicas_by_waiting),
    ),
)
@serve.ingress()
class Replica:
    """One server: its memory is taken and its programs compiled before it is ready."""

    def __init__(self) -> None:
        from sparda_jax.cli.serve import serving_from_environment

        self._serving = serving_from_environment()
        self._serving.scheduler.start()

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray."""
        return self._serving.app()

    def check_health(self) -> None:
        """Called by Ray: a replica whose engine has failed is replaced."""
        if self._serving.scheduler.failure is not None:
            raise RuntimeError(self._serving.scheduler.failure)

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Called by Ray: what `replicas_by_waiting` decides by."""
        scheduler = self._serving.scheduler
        return {
            "waiting": scheduler.waiting,
            "running": len(scheduler.rows()),
            "rows": self._serving.session.rows,
        }

    def __del__(self) -> None:
        """Called by Ray, when its requests have ended."""
        self._serving.scheduler.stop(abort=True)


app = Replica.bind()
