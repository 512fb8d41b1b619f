"""PRM in a config of torchtune."""

import importlib

import torch
import yaml

config = yaml.safe_load("""
optimizer:
  _component_: popriskmin.PRM
  lr: 0.002
  betas: [0.9, 0.95]
  weight_decay: 0.01
  softness: 1.0
""")
model = torch.nn.Linear(20, 1)
options = dict(config["optimizer"])
module, _, name = options.pop("_component_").rpartition(".")
optimizer = getattr(importlib.import_module(module), name)(model.parameters(), **options)
