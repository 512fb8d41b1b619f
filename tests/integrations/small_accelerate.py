"""A small regression with Accelerate, the same from the same seed, on as many ranks as it is started on."""

import torch
from accelerate import Accelerator
from torch import nn

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations import log


def train(size, accumulate):
    """Return the weights, and what there is to log after each step, of batches of this size on each rank."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = PRM(model.named_parameters(), lr=0.01, weight_decay=0.1)
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(data, batch_size=size, shuffle=False)
    )
    monitor = RiskMonitor(optimizer, every=1, n_dataset=96, batch_size=size * accelerator.num_processes * accumulate)
    rows = []
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            rows.append(log(optimizer, monitor, diagnosis=True))
    return [p.detach().clone() for p in accelerator.unwrap_model(model).parameters()], rows
