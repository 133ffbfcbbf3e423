"""On which stream a look-ahead fetch runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import sparda_jax as sj
from pallas_kernels.plan_slots.plan import SlotPlan
from sparda_jax.cache import routes
from sparda_jax.cache.host_store import HostStore
from sparda_jax.cache.prefetch import BlockFetch, Lookahead
from sparda_jax.cache.routes import named_route
from sparda_jax.planning.auto import offload_settings


@pytest.mark.parametrize(("devices", "stream"), [(1, 1), (2, 7), (4, 7)])
def test_a_fetch_beside_sums_has_a_stream_that_none_of_them_is_given(
    monkeypatch, devices, stream
):
    def gather(store, rows, **_):
        return jnp.zeros((rows.size, *store.shape[1:]), store.dtype)

    monkeypatch.setattr(routes, "host_gather", gather)
    settings = sj.load("tiny", attention="sparda", forecast="from_query").settings
    cache = sj.CacheConfig(kind="offload", route="dynamic_slice")
    offload = offload_settings(cache, settings.selector)
    assert offload is not None
    offload = dataclasses.replace(offload, route=named_route("mosaic"))
    settings = dataclasses.replace(settings, offload=offload, parts=devices)
    shape, dtype = (64, 2, 16), jnp.dtype(jnp.float32)
    store = HostStore.empty((1, 1, 1, 4), shape, dtype, offload.codec)
    listed, number = jnp.zeros((1, 1, 2), jnp.int32), jnp.int32(2)
    tables, entries = (listed,) * 4, (jnp.arange(2),) * 2
    plan = SlotPlan(*tables, *entries, number, number, number)

    def fetched(store):
        ahead = Lookahead(store=store)
        fetch = BlockFetch(listed, plan)
        return ahead.copy(fetch, settings, on_side_stream=True)[0].staged

    told = str(jax.make_jaxpr(fetched)(store))
    assert told.count("gpu_stream:") == told.count(f"gpu_stream:{stream}") == 1
