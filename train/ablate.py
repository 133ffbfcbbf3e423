"""`python -m train.ablate`: ways to train heads, side by side on the same batches.

    python -m train.ablate --config configs/smollm2_distill_gpu.py --steps 100 \
        --out ablation.json

Every variant changes one thing of the configuration, or of the reference's loss, and is
trained as `train.main` would: same model, batches, seed, steps and kind of schedule.
Variants are trained one after the other, the most telling ones first, each with a
program of its own that variants of the same loss share. After each of them the file
`--out` holds all that is known, so that a run that is cut off still tells something.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from sparda_jax.checks import integer, require
from sparda_jax.cli.options import Parser, add_file_option
from sparda_jax.cli.packages import command_needs

with command_needs("train", __name__):
    from train.command import run_command
    from train.config import (
        LossConfig,
        OptimizerConfig,
        TrainConfig,
        load_config,
        with_overrides,
    )
    from train.init import initial_heads
    from train.metrics import keep_json
    from train.optimizer import make_optimizer, with_inputs
    from train.run import Run
    from train.step import Gradients, make_gradients


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train: first heads, loss and learning rate."""

    init: str
    loss: LossConfig
    optimizer: OptimizerConfig


def variants(config: TrainConfig, steps: int) -> dict[str, Variant]:
    """The configuration's own way, the reference's, and one change at a time.

    The most telling ones come first. Heads that begin far from their end take the
    reference's learning rate.
    """
    ours, own = config.loss, dataclasses.replace(config.optimizer, steps=steps)
    fast = dataclasses.replace(own, lr=OptimizerConfig().lr)
    reference = LossConfig(tile=ours.tile)
    on_policy = dataclasses.replace(ours, on_policy=True)
    soft = dataclasses.replace(ours, softness=LossConfig().softness)
    far = dataclasses.replace(own, lr=own.lr * 3)
    mass = dataclasses.replace(ours, target="mass")
    white = dataclasses.replace(own, whiten=not own.whiten)
    found = {
        "ours": Variant(config.init, ours, own),
        "ours, three times the rate": Variant(config.init, ours, far),
        "ours, by mass": Variant(config.init, mass, own),
        "ours, kaiming": Variant("kaiming", ours, fast),
        "ours, from_query": Variant("from_query", ours, fast),
        "reference": Variant("from_query", reference, fast),
        "reference, kaiming": Variant("kaiming", reference, fast),
        "ours, on-policy": Variant(config.init, on_policy, own),
    }
    if ours.softness != soft.softness:
        found[f"ours, softness {soft.softness}"] = Variant(config.init, soft, own)
    if config.init == "regression":
        other = "not " * own.whiten + "whitened"
        found[f"ours, {other}"] = Variant(config.init, ours, white)
    if ours.student == "blocks":
        oracle = dataclasses.replace(ours, teacher="oracle", target="recall")
        found["ours, oracle as teacher"] = Variant(config.init, oracle, own)
    changes: dict[str, dict[str, Any]] = {
        "short rows masked": {"mask_short_rows": True},
        "student pooled": {"student": "blocks"},
        "position weighting": {"position_weight": "context"},
        "deployed teacher": {"teacher": "deployed"},
        "floor 0": {"floor": 0.0},
    }
    for name, change in changes.items():
        loss = dataclasses.replace(reference, **change)
        found[f"reference, {name}"] = Variant("from_query", loss, fast)
    return found


def make_update(optimizer: optax.GradientTransformation) -> Callable:
    """A jitted (gradient sum, weight, moments, heads) → the next moments and heads."""

    @jax.jit
    def update(
        gradient: Array, weight: Array, moments: Any, heads: Array
    ) -> tuple[Any, Any]:
        gradient = gradient / jnp.maximum(weight, 1.0)
        updates, moments = optimizer.update(gradient, moments, heads)
        return moments, optax.apply_updates(heads, updates)

    return update


class Trainer:
    """Trains variants on the batches of a run; programs are kept by loss."""

    def __init__(self, run: Run):
        """Nothing is compiled before a variant needs it."""
        self.run = run
        self._gradients: dict[LossConfig, Gradients] = {}

    def _program(self, loss: LossConfig) -> Gradients:
        run = self.run
        if loss not in self._gradients:
            settings = dataclasses.replace(run.settings, loss=loss)
            fsdp = run.config.parallel.fsdp
            made = make_gradients(run.model, settings, run.mesh, fsdp=fsdp)
            self._gradients[loss] = jax.jit(made)
        return self._gradients[loss]

    def train(
        self, name: str, variant: Variant, heads: Float[Array, "L D KRH"]
    ) -> tuple[Float[Array, "L D KRH"], dict[str, Any]]:
        """Heads after the variant's steps, and its last loss and times."""
        gradients, run = self._program(variant.loss), self.run
        optimizer = make_optimizer(variant.optimizer)
        update, moments = make_update(optimizer), optimizer.init(heads)
        if variant.optimizer.whiten:
            square = run.input_moments()
            moments = with_inputs(moments, square, progress=run.progress)
        rows, steps = run.batches(), variant.optimizer.steps
        begin = time.monotonic()
        first, loss = 0.0, jnp.float32(jnp.nan)
        for number in tqdm(range(steps), desc=name, unit="step", mininterval=2):
            gradient, total, weight = gradients(run.model, heads, next(rows))
            moments, heads = update(gradient, weight, moments, heads)
            loss = jnp.mean(total) / jnp.maximum(weight, 1.0)
            # Waiting keeps the bar honest; a step is far longer than its dispatch.
            jax.block_until_ready(heads)
            if number == 0:
                first = time.monotonic() - begin
        figures = {
            "loss": float(loss),
            "first_step_s": round(first, 1),
            "seconds": round(time.monotonic() - begin, 1),
        }
        return heads, figures


def first_heads(run: Run, how: str) -> Float[Array, "L D KRH"]:
    """Heads before training, on all devices."""
    if how == "regression":
        run.fit_heads()
        return run.state.heads
    heads = initial_heads(run.lm.model, how, run.config.seed)
    # The update leaves its input alone, so that one array serves all variants.
    return run.placed(run.state._replace(heads=heads)).heads


def ablate(
    run: Run,
    chosen: dict[str, Variant],
    *,
    note: Callable[[str, dict[str, Any]], None],
    save: tuple[str, ...] = (),
) -> None:
    """Trains the variants, and notes the held-out metrics before and after.

    Args:
      run: Model, batches and held-out rows.
      chosen: By name, in the order of training.
      note: Called with a name and what was found, as soon as it is known.
      save: Names of variants whose heads are written to the run's directory.
    """
    trainer, first = Trainer(run), {}

    def measured(heads: Array) -> dict[str, Any]:
        found = run.evaluate(run.model, heads, run.held_out)
        return {**found.means(), "layers": found.by_layer()}

    for name, variant in chosen.items():
        how = variant.init
        if how not in first:
            first[how] = first_heads(run, how)
            note(f"untrained, {how}", measured(first[how]))
        heads, figures = trainer.train(name, variant, first[how])
        note(name, {**figures, **measured(heads)})
        if name in save:
            state = run.state._replace(
                heads=heads, step=jnp.int32(variant.optimizer.steps)
            )
            file = "".join(x if x.isalnum() else "_" for x in name)
            run.export(state, None, f"{file}.safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(
        "python -m train.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="extend", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="names of variants, in that order")
    parser.add_argument(
        "--save", nargs="+", default=[], metavar="NAME", help="write these ones' heads"
    )
    add_file_option(parser, "--out", help="JSON file, kept up to date")
    return run_command(lambda: _compare(parser.parse_args(arguments)))


def _compare(options: argparse.Namespace) -> None:
    config = with_overrides(load_config(options.config), options.set)
    known = variants(config, integer(1)("--steps", options.steps))
    for option, names in (("--only", options.only or ()), ("--save", options.save)):
        for name in names:
            require(name in known, option, name, f"one of {', '.join(known)}")
    run = Run(config, progress=True)
    require(bool(run.held_out), "data.held_out", 0.0, "above 0: it is compared")
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "steps": options.steps,
        "global_batch": config.optimizer.global_batch,
        "seq_len": config.data.seq_len,
        "variants": {},
    }

    def note(name: str, found: dict[str, Any]) -> None:
        result["variants"][name] = found
        shown = {key: value for key, value in found.items() if key != "layers"}
        print(name, json.dumps(shown), file=sys.stderr, flush=True)
        keep_json(options.out, result)

    chosen = {name: known[name] for name in options.only or known}
    ablate(run, chosen, note=note, save=tuple(options.save))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
