"""PRM in timm's factory."""

import timm
import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler

from popriskmin import PRM, diagnose, param_groups

default_registry.register(OptimInfo("prm", PRM, has_betas=True))  # from then on a name, as in timm's --opt prm
model = timm.create_model("test_vit", num_classes=4, img_size=32)
optimizer = create_optimizer_v2(
    model, "prm", lr=3e-3, param_group_fn=lambda model: param_groups(model, weight_decay=0.05), softness=1.0
)
schedule = CosineLRScheduler(optimizer, t_initial=60, warmup_t=5, t_in_epochs=False)
for step in range(60):
    schedule.step_update(step)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    images[range(16), 0, labels * 8] += 6  # a bright row, by the label
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
print(diagnose(optimizer))

# timm's own groups: a learning rate by depth, no names
optimizer = create_optimizer_v2(model, "prm", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
