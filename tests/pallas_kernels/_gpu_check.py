import sys, time, traceback
import jax, jax.numpy as jnp
from pallas_kernels import paged_decode_attention, block_sparse_attention, host_gather
from pallas_kernels._common.tolerances import relative_error, tolerance
from pallas_kernels._common.validation import with_layer_axis
from pallas_kernels.paged_decode_attention import arg_specs as da, reference as dr
from pallas_kernels.block_sparse_attention import arg_specs as ba, reference as br
from pallas_kernels.host_gather import arg_specs as ha, reference as hr
print(jax.__version__, jax.devices(), flush=True)
def check(name, f, want, dt):
    try:
        got = jax.block_until_ready(f())
        errs = [relative_error(x, y) for x, y in zip(got, want)]
        print('OK  ' if max(errs) <= tolerance(dt) else 'BAD ', name, ['%.1e' % e for e in errs], flush=True)
    except NotImplementedError as e: print('NIE ', name, str(e)[:80], flush=True)
    except Exception as e: print('FAIL', name, type(e).__name__, str(e)[:600], flush=True)
for dt in sys.argv[1].split(','):
  for s in da.ARG_SPECS:
    if 'ci' not in s.tags: continue
    a = s.make(dt)
    kv, kb, ly = with_layer_axis(a['kv'], a.get('key_bias'), a.get('layer'), s.heads)
    want = jax.jit(lambda *x: dr.paged_decode_attention_reference(*x, scale=s.head_dim**-.5))(a['q'], kv, a.get('slots'), a.get('slot_lengths'), a.get('lengths'), ly, kb)
    for im in ('triton', 'mosaic_gpu'):
        check(f'decode {s.name} {dt} {im}', lambda: jax.jit(lambda a: paged_decode_attention(**a, return_lse=True, implementation=im))(a), want, dt)
  for s in ba.ARG_SPECS:
    if 'ci' not in s.tags: continue
    a = s.make(dt)
    kv, kb, ly = with_layer_axis(a['kv'], a.get('key_bias'), a.get('layer'), s.heads)
    want = jax.jit(lambda *x: br.block_sparse_attention_reference(*x, scale=s.head_dim**-.5))(a['q'], kv, a['q_start'], a.get('block_indices'), ly, kb)
    for im in ('triton', 'mosaic_gpu'):
        check(f'sparse {s.name} {dt} {im}', lambda: jax.jit(lambda a: block_sparse_attention(**a, return_lse=True, implementation=im))(a), want, dt)
  for s in ha.ARG_SPECS:
    if 'ci' not in s.tags: continue
    a = s.make(dt); want = hr.host_gather_reference(**a)
    host = jax.device_put(a['blocks'], jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind='pinned_host'))
    for im in ('triton', 'mosaic_gpu', 'xla'):
        check(f'gather {s.name} {dt} {im}', lambda: (jax.jit(lambda h, i: host_gather(h, i, implementation=im))(host, a['indices']),), (want,), dt)
