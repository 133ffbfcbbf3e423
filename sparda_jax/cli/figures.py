"""A call's figures: as a JSON record, as one live line, and as the lines of --stats."""

import json
from typing import Any

import jax

from sparda_jax.cli.cache_options import cache_lines
from sparda_jax.cli.console import rate_text, share_text
from sparda_jax.engine.model import LanguageModel
from sparda_jax.engine.results import GenerateOutput, GenerateStats


def live_text(stats: GenerateStats) -> str:
    """One line: tokens/s, share of KV blocks read, and what came over the link."""
    text = (
        f"{stats.new_tokens} tokens, "
        f"{rate_text(stats.decode_tokens_per_second)} tokens/s, "
        f"{share_text(stats.decode_blocks)} of KV blocks read"
    )
    offload = stats.offload
    if offload is not None:
        rate = offload.hit_rate
        hits = "–" if rate is None else f"{rate:.0%}"
        text += f", {hits} hits, {offload.fetched_bytes / 1e6:.1f} MB fetched"
    return text


def output_record(lm: LanguageModel, output: GenerateOutput, text: str) -> str:
    """One line of JSON: an output of one sequence and its figures.

    Bytes are bytes, times are seconds without compilation; what was not measured is
    null.
    """
    stats = output.stats
    record: dict[str, Any] = {
        "text": text,
        "tokens": output.tokens[0],
        "finish_reason": output.finish_reasons[0],
        "model": lm.config.name,
        "attention": lm.selector.name,
        "device": jax.devices()[0].device_kind,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "compile_seconds": stats.compile_seconds,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "prefill_blocks": stats.prefill_blocks,
        "decode_blocks": stats.decode_blocks,
        "policy": stats.policy,
        "offload": None,
    }
    offload = stats.offload
    if offload is not None:
        record["offload"] = {
            "route": offload.route,
            "lookahead": offload.lookahead,
            "hits": offload.hits,
            "misses": offload.misses,
            "repaired": offload.repaired,
            "fetched_bytes": offload.fetched_bytes,
            "recall": offload.recall,
        }
    return json.dumps(record, ensure_ascii=False)


def stats_lines(stats: GenerateStats, lm: LanguageModel) -> list[str]:
    """What `--stats` says."""
    device = jax.devices()[0].device_kind
    lines = [
        f"attention {lm.selector.name}, {lm.model.numbers}, {device}, "
        f"JAX {jax.__version__}"
    ]
    rows = (
        (
            "prefill",
            f"{stats.prompt_tokens} tokens",
            f"{rate_text(stats.prefill_tokens_per_second)} tokens/s",
            f"{share_text(stats.prefill_blocks)} of KV blocks read",
        ),
        (
            "decode",
            f"{stats.new_tokens} tokens",
            f"{rate_text(stats.decode_tokens_per_second)} tokens/s",
            f"{share_text(stats.decode_blocks)} of KV blocks read",
        ),
    )
    for name, tokens, rate, share in rows:
        lines.append(f"{name:8} {tokens:>14} {rate:>18}   {share}")
    lines.append(f"{'compile':8} {stats.compile_seconds:12.1f} s")
    if stats.policy:
        lines.append(f"policy   {stats.policy}")
    if stats.offload is not None:
        lines += cache_lines(stats.offload)
    return lines
