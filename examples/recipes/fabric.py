"""PRM in Lightning Fabric."""

import torch
from lightning.fabric import Fabric

from popriskmin import PRM, RiskMonitor
from popriskmin.integrations import log

fabric = Fabric(accelerator="cpu", devices=1)
fabric.seed_everything(0)
model = torch.nn.Linear(20, 1)
model, optimizer = fabric.setup(model, PRM(model.named_parameters(), lr=1e-2))
monitor = RiskMonitor(optimizer, every=4)
for _ in range(40):
    x = torch.randn(32, 20)
    loss = torch.nn.functional.mse_loss(model(x), x[:, :1])
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
fabric.log_dict(log(optimizer, monitor), step=40)
fabric.save("fabric.ckpt", {"model": model, "optimizer": optimizer, "monitor": monitor.state_dict()})

rest = fabric.load("fabric.ckpt", {"model": model, "optimizer": optimizer})
monitor.load_state_dict(rest["monitor"])
