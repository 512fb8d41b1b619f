"""A fine-tuning stored as the few weights that changed, and restored from them."""

import copy

import torch

from popriskmin import PRM, apply_patch, param_groups, patch, patch_size

base = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
x = torch.randn(400, 20)
y = x[:, :1].abs() + 0.5 * torch.randn(400, 1)

model = copy.deepcopy(base)
# shrink_to is for all groups: each parameter needs its first weights, biases too.
optimizer = PRM(param_groups(model, shrinkage=4.0), lr=1e-3, shrink_to="start",
                batch_size=20, n_dataset=400)  # fmt: skip
for _ in range(20):
    for rows in torch.randperm(400).split(20):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
torch.save(patch(optimizer), "patch.pt")
print(optimizer.shrunk(by="parameter"))

saved = torch.load("patch.pt", weights_only=True)
print(patch_size(saved))  # LoRA below this rank is smaller
restored = copy.deepcopy(base)
apply_patch(restored, saved)
