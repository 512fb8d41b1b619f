"""PRM once more, in numpy and float64, from the formulas alone; shares no code with the package."""

import numpy as np


class Reference:
    """The optimizer over a list of real arrays; `step(grads)`, with variances if those are given, changes `self.w`."""

    def __init__(self, w, lr=1e-3, betas=(0.9, 0.999), rho=0.99, eps=1e-8, weight_decay=0.01, softness=1.0,
                 batch_size=None, boundary="batch", n_dataset=None, mask="snr", reduction="per_param",
                 warmup_steps=0, amsgrad=False, bias_correction=True, decoupled_weight_decay=True, mask_eps=None,
                 debias=False, mask_decay=False, maximize=False, min_q=0.0, variance="streaming",
                 shrinkage=0.0, shrink_to="zero"):  # fmt: skip
        self.options = {k: v for k, v in locals().items() if k not in ("self", "w")}
        self.w = [np.array(x, dtype=np.float64) for x in w]
        self.m, self.v, self.s, self.v_max = ([np.zeros_like(x) for x in self.w] for _ in range(4))
        self.q = [np.ones_like(x) for x in self.w]
        self.start = [x.copy() if shrink_to == "start" else np.zeros_like(x) for x in self.w]
        self.t = [0] * len(self.w)

    def step(self, grads, variances=None):
        for i, g in enumerate(grads):
            if g is not None:
                z = None if variances is None else np.array(variances[i], dtype=np.float64)
                self._step_one(i, np.array(g, dtype=np.float64), z)

    def _step_one(self, i, g, z):
        o = self.options
        beta1, beta2 = o["betas"]
        rho, lr, decay = o["rho"], float(o["lr"]), o["weight_decay"]
        self.t[i] += 1
        t = self.t[i]
        w, m, v, s = self.w[i], self.m[i], self.v[i], self.s[i]

        if o["maximize"]:
            g = -g
        if not o["decoupled_weight_decay"]:
            g = g + decay * w

        def k(t):
            return (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)

        given = o["variance"] == "given"
        unbiased = o["debias"] or o["mask"] == "threshold"
        if given:
            s = rho * s + (1 - rho) * z
        elif unbiased:
            if t > 1:
                d = g - m / (1 - beta1 ** (t - 1))
                s = rho * s + (1 - rho) * d**2 / (1 + k(t - 1))
        else:
            d = g - m
            s = rho * s + (1 - rho) * d**2
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        v_max = np.maximum(self.v_max[i], v)
        self.m[i], self.v[i], self.s[i], self.v_max[i] = m, v, s, v_max

        corrected = o["bias_correction"]
        m_hat = m / (1 - beta1**t) if corrected else m
        v_hat = (v_max if o["amsgrad"] else v) / (1 - beta2**t if corrected else 1)
        if unbiased and not given:
            s_hat = s / (1 - rho ** (t - 1)) if t > 1 else s
        else:
            s_hat = s / (1 - rho**t) if corrected else s

        signal, noise = m_hat**2, s_hat
        if o["reduction"] == "per_tensor":
            signal, noise = np.full_like(w, signal.mean()), np.full_like(w, noise.mean())

        def masked(signal, noise):
            if t <= o["warmup_steps"] or (unbiased and not given and t == 1):
                return np.ones_like(w)
            if o["debias"] and o["mask"] != "threshold":
                signal = np.maximum(signal - k(t) * noise, 0)
            return np.maximum(self._mask(signal, noise, k(t)), o["min_q"])

        q = masked(signal, noise)
        self.q[i], self.signal, self.noise = q, signal, noise

        if o["decoupled_weight_decay"]:
            w = w - lr * decay * (q if o["mask_decay"] else 1) * w
        denominator = np.sqrt(v_hat) + o["eps"]
        w = w - lr * q * m_hat / denominator
        if o["shrinkage"] > 0 and w.ndim >= 2 and t >= 2:
            x = o["shrinkage"] * np.sqrt(o["batch_size"] / (o["n_dataset"] - o["batch_size"]) * s_hat)
            r = lr * (q if o["reduction"] == "per_tensor" else masked(x**2, s_hat)) * x / denominator
            start = self.start[i]
            w = start + np.sign(w - start) * np.maximum(np.abs(w - start) - r, 0)
        self.w[i] = w

    def _mask(self, signal, noise, k):
        o = self.options
        b, n = o["batch_size"], o["n_dataset"]
        a = b / (n - b) if o["boundary"] == "empirical" else 1
        e = o["eps"] ** 2 if o["mask_eps"] is None else o["mask_eps"]
        e = max(e, np.finfo(np.float64).tiny)
        softness = o["softness"]
        if o["mask"] == "snr":
            return signal / (signal + softness * a * noise + e)
        if o["mask"] == "soft":
            x = np.maximum(signal - a * noise, 0)
            return x / (x + softness * noise + e)
        if o["mask"] == "threshold":
            return np.maximum(0, 1 - np.sqrt((softness * a * k * noise + e) / (signal + e)))
        if o["mask"] == "hard":
            return np.where(signal > a * noise, 1.0, 0.0)
        return np.ones_like(signal)
