"""Random but valid options for PRM, and random problems, for hypothesis."""

import numpy as np
from hypothesis import strategies as st

rates = st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999])


@st.composite
def options(draw):
    """Draw any combination of options that changes the update."""
    mask = draw(st.sampled_from(["snr", "soft", "hard", "threshold", "none"]))
    bias_correction = mask == "threshold" or draw(st.booleans())
    decoupled = draw(st.booleans())
    drawn = {
        "lr": draw(st.sampled_from([1e-3, 1e-2, 0.1])),
        "betas": (draw(rates), draw(rates)),
        "rho": draw(rates),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 1e-10])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "softness": draw(st.sampled_from([0.3, 1.0, 10.0])),
        "mask": mask,
        "reduction": draw(st.sampled_from(["per_param", "per_tensor"])),
        # At the first step signal and noise are the same number, and rounding would decide the hard mask.
        "warmup_steps": draw(st.integers(1 if mask == "hard" else 0, 3)),
        "amsgrad": draw(st.booleans()),
        "bias_correction": bias_correction,
        "decoupled_weight_decay": decoupled,
        "mask_eps": draw(st.sampled_from([None, 1e-8, 0.0])),
        "debias": bias_correction and draw(st.booleans()),
        "mask_decay": decoupled and draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "min_q": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "variance": draw(st.sampled_from(["streaming", "given"])),
    }
    drawn["boundary"] = draw(st.sampled_from(["batch", "empirical"]))
    # Numbers whose square times c is no mask's boundary, where rounding would decide.
    drawn["shrinkage"] = draw(st.sampled_from([0.0, 0.0, 0.57, 2.13]))
    if drawn["boundary"] == "empirical" or drawn["shrinkage"]:
        batch_size = draw(st.integers(1, 100))
        drawn |= {"batch_size": batch_size, "n_dataset": batch_size + draw(st.integers(1, 1000))}
        drawn["shrink_to"] = draw(st.sampled_from(["zero", "start"]))
    return drawn


problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "scale": st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
        "steps": st.integers(1, 6),
    }
)


def made_up_variances(grads):
    """Return float64 arrays of the gradients' shapes and scale, for `variance="given"`."""
    rng = np.random.default_rng(len(grads))
    grads = [np.asarray(g, dtype=np.float64) for g in grads]
    return [np.mean(g**2) * rng.exponential(size=g.shape) if g.size else np.zeros(g.shape) for g in grads]
