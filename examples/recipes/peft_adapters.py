"""PRM on the adapters of a PEFT model."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from popriskmin import PRM, diagnose

sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
model.print_trainable_parameters()
trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
optimizer = PRM(trainable, lr=1e-2)
for _ in range(60):
    tokens = torch.randint(32, (4, 8))
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
print(diagnose(optimizer))
