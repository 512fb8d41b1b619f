"""An implicit neural representation: from places to brightness, on noisy pixels."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from popriskmin.compare.task import Metrics, Task, Trial, check_least, complete, option

SCALES = {
    "test": {"size": 16, "features": 8, "width": 16, "batch_size": 64, "steps": 20},
    "default": {"size": 64, "features": 64, "width": 128, "batch_size": 512, "steps": 1500},
    "paper": {"size": 256, "features": 256, "width": 256, "batch_size": 8192, "steps": 5000},
}
HELD_OUT = 0.1  # share of the pixels, for validation


@dataclasses.dataclass
class Inr(Task):
    """Fit a network to the noisy pixels of one of scikit-learn's photographs.

    The network takes random Fourier features of a place (Tancik et al.,
    arXiv:2006.10739) and returns the brightness, which is in [0, 1] in the clean image.
    Noise, features and batches come from the seed. The metric is the peak
    signal-to-noise ratio in decibels. The test takes all clean pixels. The validation
    takes a tenth of the noisy ones, which are not trained on.
    """

    scale: Literal["test", "default", "paper"] = option("default", "which values the options below have by default")
    image: Literal["china", "flower"] = option("china", "the photograph")
    noise: float = option(0.2, "standard deviation of the noise; brightness goes from 0 to 1")
    frequency: float = option(8.0, "standard deviation of the features' frequencies, in periods over the image")
    size: int = option(None, "pixels of each side")
    features: int = option(None, "frequencies; each gives a sine and a cosine")
    width: int = option(None, "units in each of the two hidden layers")
    batch_size: int = option(None, "pixels in a batch")
    steps: int = option(None, "optimizer steps")

    metrics: ClassVar[dict[str, str]] = {"psnr": "max"}
    learning_rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weight_decays = (0.01, 0.1)

    def __post_init__(self) -> None:
        """Complete the options from the scale, and check them."""
        complete(self, SCALES[self.scale])
        least = {"noise": 0.0, "frequency": 0.0, "size": 4, "features": 1, "width": 1, "batch_size": 1, "steps": 1}
        check_least(self, least)
        if self.size > MOST:
            raise ValueError(f"size must be at most {MOST}, the photograph's, got {self.size}")

    def trial(self, seed: int) -> Trial:
        """Draw noise, features, pixels and batches from the seed; build the network."""
        return self._make(seed, joined=False)

    def joined(self, seed: int) -> Trial:
        """Train on all noisy pixels, for as many passes."""
        return self._make(seed, joined=True)

    def _make(self, seed: int, joined: bool) -> Trial:
        generator = torch.Generator().manual_seed(seed)
        clean = photograph(self.image, self.size).flatten()
        noisy = clean + self.noise * torch.randn(clean.shape, generator=generator)
        line = (torch.arange(self.size) + 0.5) / self.size
        places = torch.cartesian_prod(line, line)
        frequencies = self.frequency * torch.randn(2, self.features, generator=generator)
        order = torch.randperm(len(clean), generator=generator)
        held_out, training = order.tensor_split([round(HELD_OUT * len(clean))])
        steps = self.steps
        if joined:
            steps, training = round(steps * len(order) / len(training)), order
        batches: list[Tensor] = []
        while len(batches) < steps:
            batches += torch.split(training[torch.randperm(len(training), generator=generator)], self.batch_size)
        model = nn.Sequential(
            Fourier(frequencies),
            nn.Linear(2 * self.features, self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
            nn.ReLU(),
            nn.Linear(self.width, 1),
        )
        return Trial(
            model=model,
            batches=batches[:steps],
            loss=lambda model, rows: (model(places[rows])[:, 0] - noisy[rows]).square().mean(),
            validation=lambda model: psnr(model(places[held_out])[:, 0], noisy[held_out]),
            test=lambda model: psnr(model(places)[:, 0], clean),
            evaluate_every=max(1, self.steps // 30),
            batch_size=min(self.batch_size, len(training)),
            n_dataset=len(training),
        )


class Fourier(nn.Module):
    """Sines and cosines of places, for fixed frequencies of shape (2, features)."""

    frequencies: Tensor

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies)

    def forward(self, places: Tensor) -> Tensor:
        """Return features of shape (places, 2 * features)."""
        angles = 2 * math.pi * places @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


MOST = 427  # the photographs are 427 x 640


@functools.lru_cache
def photograph(name: str, side: int) -> Tensor:
    """Return the middle square of a photograph, in grey from 0 to 1.

    It is averaged down to `side` pixels a side.
    """
    pixels = torch.tensor(load_sample_image(f"{name}.jpg"), dtype=torch.float32).mean(2) / 255
    left = (pixels.shape[1] - MOST) // 2
    square = pixels[None, None, :, left : left + MOST]
    return nn.functional.interpolate(square, (side, side), mode="area")[0, 0]


def psnr(image: Tensor, truth: Tensor) -> Metrics:
    """Return the peak signal-to-noise ratio for a peak of 1, in decibels."""
    return {"psnr": -10 * math.log10(max((image - truth).square().mean().item(), 1e-12))}
