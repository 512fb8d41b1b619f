"""The task `dpo` on a model of transformers: a small one that is made here stands for those that a hub would give."""

import json
import random

import pytest
import torch
from frameworks import framework

transformers = framework("transformers")
tokenizers = framework("tokenizers")
framework("peft")

from popriskmin.compare.training.arms import make_arms  # noqa: E402
from popriskmin.compare.training.train import Configuration, run  # noqa: E402
from popriskmin.tasks import dpo_hub  # noqa: E402
from popriskmin.tasks.dpo import Dpo  # noqa: E402
from popriskmin.tasks.dpo_pairs import log_probabilities  # noqa: E402

WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a Llama of two layers and a tokenizer of words, as transformers would."""
    where = str(tmp_path_factory.mktemp("model"))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(where)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.fixture
def preferences(tmp_path):
    """Write pairs in UltraFeedback's columns: a prompt, and conversations of which the last message is the answer."""
    path = tmp_path / "pairs.jsonl"
    lines = []
    for i in range(30):
        prompt = f"w{i} w{i + 1}"
        sides = {"chosen": f"w{i} w{i} w{i}", "rejected": f"w{39 - i} w0"}
        talks = {
            name: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for name, answer in sides.items()
        }
        lines.append(json.dumps({"prompt": prompt, **talks}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_lora_begins_as_the_model_and_shares_its_weights(folder):
    reference, _ = dpo_hub.load(folder)
    policies = [dpo_hub.policy(folder, rank=2) for _ in range(2)]
    tokens = torch.randint(len(WORDS), (3, 7))
    torch.testing.assert_close(policies[0](tokens), reference(tokens))
    trained = [name for name, p in policies[0].named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # two thin layers, for queries and values, in two layers
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    frozen = {p.data_ptr() for p in reference.parameters()}
    for policy in policies:
        mine = {p.data_ptr() for p in policy.parameters()}
        assert frozen <= mine
    up = next(p for name, p in policies[0].named_parameters() if "lora_B" in name)
    with torch.no_grad():
        up.fill_(0.1)
    assert not torch.allclose(policies[0](tokens), reference(tokens))
    torch.testing.assert_close(policies[1](tokens), reference(tokens))


def test_a_run_on_a_data_set_of_a_file(folder, preferences):
    framework("datasets")
    task = Dpo(model=folder, dataset=preferences, scale="test", rank=2, length=6)
    for arm in make_arms()[:2]:
        records = run(task, arm, Configuration(1e-2, 0.01, 0))
        assert records[-1]["status"] == "finished", records[-1].get("error")
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        assert evaluations[0]["test"]["accuracy"] == 0.5
        assert evaluations[0]["test"]["drift"] == pytest.approx(0, abs=1e-5)
        assert evaluations[-1]["test"]["drift"] > 1e-4


def test_the_pairs_that_a_file_holds(folder, preferences):
    framework("datasets")
    model, tokenizer = dpo_hub.load(folder)
    training, validation, test = dpo_hub.prepared(folder, preferences, 0, (10, 8, 8), 0.0, 6)
    said = set()
    for part in (training, validation, test):
        for row, answers in zip(part.tokens, part.answers):
            words = [tokenizer.convert_ids_to_tokens(side[marked].tolist()) for side, marked in zip(row, answers)]
            assert words[0] == [words[0][0]] * 3
            assert words[1] == [f"w{39 - int(words[0][0][1:])}", "w0"]
            said.add(words[0][0])
        with torch.no_grad():
            torch.testing.assert_close(part.reference, log_probabilities(model, part))
    assert len(said) == 26  # no pair twice


def test_questions_about_the_reference_are_of_parts_that_do_not_meet():
    parts = dpo_hub.from_reference(random.Random(0), (40, 10, 10))
    topics = [{row["prompt"] for row in part} for part in parts]
    assert not topics[0] & topics[1]
    assert not (topics[0] | topics[1]) & topics[2]
    assert all(row["chosen"] != row["rejected"] for part in parts for row in part)


def test_a_data_set_without_a_column_and_one_that_is_too_small(folder, tmp_path):
    framework("datasets")
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "w1", "chosen": "w2"}\n')
    with pytest.raises(ValueError, match=r"wrong.jsonl has no rejected, but prompt, chosen"):
        Dpo(model=folder, dataset=str(path), scale="test").trial(0)
    path.write_text('{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n')
    with pytest.raises(ValueError, match=r"has 1 pairs, fewer than 16"):
        Dpo(model=folder, dataset=str(path), scale="test").trial(0)


def test_a_model_without_the_layers_for_lora(folder, monkeypatch):
    monkeypatch.setattr(dpo_hub, "TARGETS", ("nowhere",))
    with pytest.raises(ValueError, match="has no linear layers called nowhere to put LoRA on"):
        dpo_hub.policy(folder, rank=2)


def test_smollm2_on_a_small_model_in_a_file_of_the_same_kind(tmp_path, monkeypatch):
    framework("gguf")
    framework("accelerate")
    from integrations import small_gguf

    small_gguf.write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    task = Dpo(model="smollm2", scale="test", rank=2, length=6)
    records = run(task, make_arms()[1], Configuration(1e-2, 0.01, 0))
    assert records[-1]["status"] == "finished", records[-1].get("error")
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert evaluations[0]["test"]["accuracy"] == 0.5
    assert evaluations[-1]["test"]["drift"] > 1e-4
    dpo_hub.load.cache_clear()


def test_a_joined_run_fills_up_the_shorter_pairs(folder, preferences):
    framework("datasets")
    task = Dpo(model=folder, dataset=preferences, scale="test", rank=2, length=6)
    (training, validation, _), _ = task._prepare(0)
    short = training._replace(tokens=training.tokens[:, :, :4], answers=training.answers[:, :, :4])
    both = short.with_more(validation)
    assert both.tokens.shape == (len(short.tokens) + len(validation.tokens), 2, validation.tokens.shape[2])
    assert not both.answers[: len(short.tokens), :, 4:].any()
    assert torch.equal(both.tokens[len(short.tokens) :], validation.tokens)
