"""Time a step of `popriskmin.optax.prm` beside `optax.adamw` under `jit`, on 37 million scalars.

    python benchmarks/jax_step.py

Both update one tree of the shapes of a transformer, turn by turn, with the buffers of the step before donated, as a
training loop does. Needs the extra `jax`.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from popriskmin.optax import prm

WIDTH, LAYERS, TOKENS = 512, 10, 10_000


def parameters() -> dict[str, jax.Array]:
    """Return about 37 million scalars."""
    shapes = {"embedding": (TOKENS, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"{layer}.attention": (WIDTH, 4 * WIDTH),
            f"{layer}.up": (WIDTH, 4 * WIDTH),
            f"{layer}.down": (4 * WIDTH, WIDTH),
            f"{layer}.norm": (WIDTH,),
        }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: 0.02 * jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}


def main() -> None:
    """Print the median time of each, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    rounds = parser.parse_args().rounds
    counts = {"batch_size": 100, "n_dataset": 10_000}
    solvers = {
        "optax.adamw": optax.adamw(1e-3),
        "prm": prm(1e-3),
        "prm, mask='soft'": prm(1e-3, mask="soft"),
        "prm, per_tensor": prm(1e-3, reduction="per_tensor"),
        "prm, shrinkage=2": prm(1e-3, shrinkage=2.0, **counts),
    }
    grads = jax.tree.map(lambda p: p * 0.1, parameters())
    print(f"{sum(p.size for p in grads.values()) / 1e6:.1f}M scalars in float32, {jax.devices()[0].device_kind}")
    times: dict[str, list[float]] = {name: [] for name in solvers}
    carries, steps = {}, {}
    for name, solver in solvers.items():

        def step(params, state, grads, solver=solver):  # type: ignore[no-untyped-def]
            updates, state = solver.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        steps[name] = jax.jit(step, donate_argnums=(0, 1))
    for name, solver in solvers.items():
        params = jax.tree.map(jnp.copy, parameters())
        carries[name] = (params, solver.init(params))
    for number in range(rounds + 2):
        for name in solvers:
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](*carries[name], grads))
            if number >= 2:  # the first compiles
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        print(f"{name:20} {1000 * median:8.1f} ms {median / medians['optax.adamw']:6.2f} times optax.adamw")


if __name__ == "__main__":
    main()
