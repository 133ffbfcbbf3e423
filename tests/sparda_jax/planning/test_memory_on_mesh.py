"""The bytes of a device of a mesh, against what the compiler says of its program."""

import pytest
from mesh_cases import on_four_devices

DECODE = """
    import dataclasses, json, sys
    import jax, jax.numpy as jnp
    from planning_cases import Case
    from sparda_jax.engine.on_mesh import OnMesh, StateLayout, place_request
    from sparda_jax.inference.generate import decode_loop
    from sparda_jax.mesh import MeshConfig, laid_out
    from sparda_jax.models.sharding import config_of_device, model_specs
    from sparda_jax.planning.memory import memory_plan

    def figures(parts, kind):
        case = Case(kind=kind, batch=8, prompt=200, vocab=32768)
        whole, mesh = case.settings.config, MeshConfig(model=parts)
        own = config_of_device(whole, parts)
        settings = dataclasses.replace(case.settings, config=own, parts=parts)
        layout = StateLayout(whole, settings, mesh, case.batch, case.shapes, case.cache,
                             jnp.dtype(case.dtype), case.storage)
        model, _, _, request = case.arguments()
        model = laid_out(model, model_specs(model, whole), mesh.devices)
        program = OnMesh(decode_loop, layout, whole, own, mesh)
        call = jax.jit(lambda *given: program(*given, settings=settings),
                       donate_argnums=(1,))
        given = model, layout.types(), place_request(request, layout)
        found = call.lower(*given).compile().memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        plan = memory_plan(settings, case.cache, batch=case.batch, shapes=case.shapes,
                           dtype=case.dtype, storage=case.storage)
        return {"held": held - found.alias_size_in_bytes,
                "persistent": plan.persistent + plan.host,
                "scratch": found.temp_size_in_bytes,
                "planned": plan.decode_peak - plan.persistent}

    print(json.dumps([figures(int(parts), kind)
                      for parts, kind in zip(sys.argv[1::2], sys.argv[2::2])]))
"""


@pytest.mark.slow
@pytest.mark.long  # of one device: `Case(vocab=32768, …)` in `test_memory`
def test_a_device_s_figures_equal_the_compiled_analysis():
    """Whose scratch is what a token is drawn from."""
    found = on_four_devices(DECODE, "2", "resident", "2", "offload")
    for one in found:
        assert one["persistent"] == pytest.approx(one["held"], rel=0.05)
        assert one["planned"] == pytest.approx(one["scratch"], rel=0.05)
