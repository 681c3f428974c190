"""Tiny GGUF files for tests, written by the `gguf` package's own writer."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

D, HEADS, KV_HEADS, HEAD_DIM, D_FF, LAYERS = 64, 4, 2, 16, 96, 2
BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES += [0x100 + i for i in range(256 - len(BYTES))]  # GPT-2's spelling, in some order
MERGES = ["t h", "th e", "Ġ the", "i n", "1 2", "Ġ t"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *map(chr, BYTES)]
TOKENS += [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


def llama_tensors(seed=0, *, tied=True, layers=LAYERS):
    """Hugging Face's tensors of a small Llama, by name: float32 with a spread of sizes."""
    draw = np.random.default_rng(seed)
    vocab, kv, q = len(TOKENS), KV_HEADS * HEAD_DIM, HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (vocab, D), "model.norm.weight": (D,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (q, D),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, D),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, D),
            f"model.layers.{i}.self_attn.o_proj.weight": (D, q),
            f"model.layers.{i}.mlp.gate_proj.weight": (D_FF, D),
            f"model.layers.{i}.mlp.up_proj.weight": (D_FF, D),
            f"model.layers.{i}.mlp.down_proj.weight": (D, D_FF),
            f"model.layers.{i}.input_layernorm.weight": (D,),
            f"model.layers.{i}.post_attention_layernorm.weight": (D,),
        }
    if not tied:
        shapes["lm_head.weight"] = (vocab, D)
    return {n: draw.normal(size=shape).astype(np.float32) / 4 for n, shape in shapes.items()}


LLAMA_NAMES = {  # written out here, not taken from the table under test
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_name(theirs):
    if theirs in LLAMA_NAMES:
        return LLAMA_NAMES[theirs]
    _, _, layer, part = theirs.split(".", 3)
    return f"blk.{layer}.{LLAMA_NAMES[part.removesuffix('.weight')]}.weight"


def interleaved(array, heads):
    """Rows as llama.cpp's converter stores them, whose rotary positions turn neighbours.

    Row by row: of a head's rows, the i-th of the first half and the i-th of the second half stand
    side by side.
    """
    found = np.empty_like(array)
    size = len(array) // heads
    for head in range(heads):
        for i in range(size // 2):
            found[head * size + 2 * i] = array[head * size + i]
            found[head * size + 2 * i + 1] = array[head * size + size // 2 + i]
    return found


def add_llama_keys(writer, *, layers=LAYERS):
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(TOKENS))


def add_tokenizer(writer, *, tokens=TOKENS, merges=MERGES, pre="smollm", template=TEMPLATE):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - 4))
    if merges is not None:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def write(path, tensors, *, keys=add_llama_keys, tokenizer=add_tokenizer, kind="F32", extra=None):
    """Writes a Llama; matrices in a type that `gguf` quantizes to, norms in float32.

    Args:
      tensors: Hugging Face's.
      keys, tokenizer: add what the header says; None for nothing.
      extra: is given the writer last.
    """
    writer = GGUFWriter(path, "llama")
    for add in (keys, tokenizer):
        if add is not None:
            add(writer)
    for name, array in tensors.items():
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                array = interleaved(array, heads)
        add_tensor(writer, llama_name(name), array, kind if array.ndim > 1 else "F32")
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer, name, array, kind):
    from gguf.quants import quantize

    number = GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, array.astype(np.float32 if kind == "F32" else np.float16))
    else:
        writer.add_tensor(name, quantize(array, number), raw_dtype=number)
