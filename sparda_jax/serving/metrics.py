"""What a server counts: for Prometheus, the status page and the log.

Names begin with `vllm:` where vLLM has the figure, so that its dashboards show it, and
with `sparda:` where only an offloaded cache with a forecast has it.
"""

import collections
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import prometheus_client as prometheus

from sparda_jax.cache.offload import OffloadCache
from sparda_jax.engine.offload_stats import OffloadStats, offload_stats
from sparda_jax.engine.session import Session
from sparda_jax.serving.jobs import Job
from sparda_jax.serving.observer import Observer
from sparda_jax.serving.protocol import ApiRequest

LOGGER = logging.getLogger("sparda_jax.serving")

_FIRST_TOKEN = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
# Seconds between two looks at the counters on the device, and of the rate shown.
_LOOK_EVERY = 1.0
_RATE_OVER = 10.0


def log(event: str, **fields: object) -> None:
    """Writes one line of JSON; texts of requests never are among the fields."""
    LOGGER.info(json.dumps({"event": event, "time": round(time.time(), 3), **fields}))


class Metrics(Observer):
    """Counts what a scheduler tells; its `Observer`.

    Args:
      model_name: The label of all figures.
      session: The scheduler's.
    """

    content_type = prometheus.CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, session: Session):
        self._registry = prometheus.CollectorRegistry()
        self._model = model_name
        self._rows, self._context = session.rows, session.max_context
        self._begun = time.monotonic()
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._offload: OffloadStats | None = None
        self._looked = 0.0
        self._waiting = 0
        self._running = self._gauge("vllm:num_requests_running", "Outputs with a row")
        self._queued = self._gauge("vllm:num_requests_waiting", "Outputs without one")
        self._usage = self._gauge(
            "vllm:kv_cache_usage_perc", "Share of the cache's tokens in use"
        )
        self._queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix store"
        )
        self._hits = self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found there, and not run again"
        )
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens")
        self._generated = self._counter("vllm:generation_tokens", "Output tokens")
        self._success = prometheus.Counter(
            "vllm:request_success",
            "Outputs by how they ended",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._histograms = {
            name: self._histogram(f"vllm:{name}_seconds", about, buckets)
            for name, about, buckets in (
                ("time_to_first_token", "From arrival", _FIRST_TOKEN),
                ("inter_token_latency", "Between tokens of an output", _BETWEEN),
                ("e2e_request_latency", "From arrival to the end", _WHOLE),
                ("request_queue_time", "Waiting for a row", _WHOLE),
                ("request_prefill_time", "From the row to the first token", _WHOLE),
                ("request_decode_time", "From the first token to the end", _WHOLE),
            )
        }
        self._fetches = {
            name: self._gauge(f"sparda:{name}", about)
            for name, about in (
                ("fetch_hits", "KV blocks asked for that were on the device"),
                ("fetch_misses", "KV blocks fetched from host memory"),
                ("fetched_bytes", "Bytes fetched from host memory"),
                ("forecast_recall", "Blocks forecast of those the own queries choose"),
            )
        }

    def _gauge(self, name: str, about: str) -> prometheus.Gauge:
        made = prometheus.Gauge(name, about, ("model_name",), registry=self._registry)
        return made.labels(self._model)

    def _counter(self, name: str, about: str) -> prometheus.Counter:
        made = prometheus.Counter(name, about, ("model_name",), registry=self._registry)
        return made.labels(self._model)

    def _histogram(
        self, name: str, about: str, buckets: Sequence[float | int]
    ) -> prometheus.Histogram:
        made = prometheus.Histogram(
            name, about, ("model_name",), registry=self._registry, buckets=buckets
        )
        return made.labels(self._model)

    def export(self) -> bytes:
        """The figures in Prometheus' form."""
        return prometheus.generate_latest(self._registry)

    def accepted(self, request_id: str, asked: ApiRequest, took: float) -> None:
        """A request has been accepted, `took` seconds after it came."""
        log(
            "accepted",
            request_id=request_id,
            prompts=len(asked.prompts),
            outputs=len(asked.configs),
            prompt_tokens=sum(map(len, asked.prompts)),
            max_new_tokens=asked.configs[0].max_new_tokens,
            stream=asked.stream,
            seconds=round(took, 4),
        )

    def refused(self, path: str, status: int, message: str) -> None:
        """A request has been refused."""
        log("refused", path=path[:100], status=status, message=message[:300])

    def round(self, session: Session, *, waiting: int, running: int) -> None:
        """As `Observer`."""
        self._running.set(running)
        self._queued.set(waiting)
        self._waiting = waiting
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY and (running or waiting):
            return
        self._looked = now
        held = session.held_tokens()
        self._usage.set(sum(held) / (self._rows * self._context))
        offload, cache = session.settings.offload, session.state.cache
        if offload is None or not isinstance(cache, OffloadCache):
            return
        block_bytes = cache.store.bytes_per_block
        stats = offload_stats(session.state.fetches, offload, block_bytes=block_bytes)
        self._offload = stats
        self._fetches["fetch_hits"].set(stats.hits)
        self._fetches["fetch_misses"].set(stats.misses)
        self._fetches["fetched_bytes"].set(stats.fetched_bytes)
        if stats.recall is not None:
            self._fetches["forecast_recall"].set(stats.recall)

    def tokens(self, job: Job, count: int, now: float) -> None:
        """As `Observer`."""
        if not count:
            return
        times, observed = job.times, self._histograms
        if "first" not in times:
            observed["time_to_first_token"].observe(now - times["arrived"])
            observed["request_queue_time"].observe(times["joined"] - times["submitted"])
            observed["request_prefill_time"].observe(now - times["joined"])
            self._prompt.inc(len(job.prompt))
            self._queries.inc(len(job.prompt))
            self._hits.inc(job.cached)
        else:
            for _ in range(count):
                observed["inter_token_latency"].observe((now - times["last"]) / count)
        self._generated.inc(count)
        self._recent.append((now, count))
        while self._recent and now - self._recent[0][0] > _RATE_OVER:
            self._recent.popleft()

    def ended(self, job: Job, reason: str) -> None:
        """As `Observer`."""
        times, observed = job.times, self._histograms
        self._success.labels(self._model, reason).inc()
        if reason in ("stop", "length"):
            observed["e2e_request_latency"].observe(times["ended"] - times["arrived"])
            observed["request_decode_time"].observe(times["ended"] - times["first"])
        log(
            "ended",
            request_id=job.request_id,
            reason=reason,
            prompt_tokens=len(job.prompt),
            cached_tokens=job.cached,
            new_tokens=job.count,
            seconds=round(times["ended"] - times["arrived"], 4),
        )

    def failed(self, error: Exception) -> None:
        """As `Observer`."""
        LOGGER.error("the engine has stopped", exc_info=error)

    def status(self, rows: Sequence[tuple[int, Job]]) -> dict[str, Any]:
        """What the status page shows.

        Args:
          rows: Those that are taken, with their jobs.
        """
        now = time.monotonic()
        recent = [(at, count) for at, count in tuple(self._recent)]
        counted = sum(count for at, count in recent if now - at <= _RATE_OVER)
        over = min(_RATE_OVER, now - self._begun)
        offload = self._offload
        return {
            "model": self._model,
            "rows": self._rows,
            "max_context": self._context,
            "waiting": self._waiting,
            "tokens_per_second": round(counted / over, 2) if over else 0.0,
            "running": [
                {
                    "row": row,
                    "request_id": job.request_id,
                    "phase": "prefill" if job.filling else "decode",
                    "prompt_tokens": len(job.prompt),
                    "cached_tokens": job.cached,
                    "new_tokens": job.count,
                    "max_new_tokens": job.config.max_new_tokens,
                    "seconds": round(now - job.times["arrived"], 2),
                }
                for row, job in rows
            ],
            "offload": None
            if offload is None
            else {
                "hits": offload.hits,
                "misses": offload.misses,
                "fetched_bytes": offload.fetched_bytes,
                "recall": offload.recall,
            },
        }
