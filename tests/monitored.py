"""Trainings that a risk monitor watches, for tests of it."""

import torch
from torch import nn

from popriskmin import PRM, RiskMonitor

BUILDS = {"PRM": PRM, "AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


class Line:
    """A noisy linear regression on fresh data, with what a monitor is asked for."""

    def __init__(self, build=PRM, monitored=True, every=2, **options):
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Linear(20, 1)
        self.optimizer = build(self.model.parameters(), lr=1e-2)
        self.monitor = RiskMonitor(self.optimizer, every=every, **options) if monitored else None

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(16, 20, generator=self.generator)
            y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=self.generator)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def risk(self):
        """The population risk of the model, exactly."""
        return ((self.model.weight - 1).square().sum() + self.model.bias.square().sum() + 1).item()


class Memorizer:
    """Labels that are noise, few of them, used again and again: all there is to learn is how they came out."""

    def __init__(self, build, lr=3e-3, **options):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(120, 40), torch.randn(120, 1)
        self.model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
        self.optimizer = build(self.model.parameters(), lr=lr)
        if "keep_best" in options:
            options["keep_best"] = self.model
        if "held_out" in options:
            options["held_out"] = self.losses
        self.monitor = RiskMonitor(self.optimizer, every=2, n_dataset=60, batch_size=10, **options)

    def losses(self):
        self.model.eval()
        losses = (self.model(self.x[60:]) - self.y[60:]).square()[:, 0]
        self.model.train()
        return losses

    def passes(self, count):
        for _ in range(count):
            for rows in torch.randperm(60).split(10):
                self.optimizer.zero_grad()
                nn.functional.mse_loss(self.model(self.x[rows]), self.y[rows]).backward()
                self.optimizer.step()
        return self
