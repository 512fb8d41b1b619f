"""An optimizer per parameter, stepped in the backward pass."""

import torch

from popriskmin import PRM, diagnose

model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizers = {p: PRM([(name, p)], lr=1e-2) for name, p in model.named_parameters()}


def step(p):
    """Step one parameter and free its gradient."""
    optimizers[p].step()
    optimizers[p].zero_grad()


for p in model.parameters():
    p.register_post_accumulate_grad_hook(step)
for _ in range(60):
    x = torch.randn(32, 20)
    torch.nn.functional.mse_loss(model(x), x[:, :1]).backward()

print(diagnose(optimizers.values()))
