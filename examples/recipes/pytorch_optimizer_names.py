"""PRM in the wrappers of pytorch-optimizer, and under a name of its."""

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer import OPTIMIZERS

from popriskmin import PRM, diagnose
from popriskmin.integrations import log

model = torch.nn.Linear(20, 1)
optimizer = pytorch_optimizer.Lookahead(PRM(model.named_parameters(), lr=1e-2), k=5)
for _ in range(60):
    x = torch.randn(32, 20)
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), x[:, :1]).backward()
    optimizer.step()
print(log(optimizer)["prm/mean_q"], diagnose(optimizer))

OPTIMIZERS["prm"] = PRM  # from then on a name like any other
optimizer = pytorch_optimizer.create_optimizer(model, "prm", lr=1e-2, weight_decay=0.01, softness=2.0)
