"""Averages of the weights beside PRM, and the schedule of SWA."""

import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from popriskmin import PRM

x = torch.randn(512, 20)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), batch_size=32)
model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = PRM(model.named_parameters(), lr=1e-2)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
swa, swa_from, swa_rate = AveragedModel(model), 5, SWALR(optimizer, swa_lr=5e-3, anneal_epochs=2)
for epoch in range(10):
    for inputs, targets in data:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        ema.update_parameters(model)
    if epoch >= swa_from:
        swa.update_parameters(model)
        swa_rate.step()
update_bn(data, swa)
update_bn(data, ema)
