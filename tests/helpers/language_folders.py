"""Hugging Face folders of tiny random language models, each with a tokenizer and a text."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

FAMILIES = {
    "llama": dict(hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False),
    "mistral": dict(hidden_act="silu", rms_norm_eps=1e-5, sliding_window=8),
    "qwen2": dict(hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=True),
    "qwen3": dict(hidden_act="silu", rms_norm_eps=1e-6, head_dim=8, tie_word_embeddings=True),
    "olmo2": dict(hidden_act="silu", rms_norm_eps=1e-6),
    "phi3": dict(hidden_act="silu", rms_norm_eps=1e-5, pad_token_id=0),
    "gemma2": dict(hidden_activation="gelu_pytorch_tanh", head_dim=8, query_pre_attn_scalar=8),
    "gemma3_text": dict(hidden_activation="gelu_pytorch_tanh", head_dim=8),
    "opt": dict(do_layer_norm_before=True, word_embed_proj_dim=32),
    "gpt2": {},
}
VOCAB, WIDTH, INNER, LAYERS, LENGTH = 24, 32, 64, 3, 32
_OWN = {
    "opt": dict(
        hidden_size=WIDTH,
        ffn_dim=INNER,
        num_attention_heads=4,
        num_hidden_layers=LAYERS,
        max_position_embeddings=LENGTH,
    ),
    "gpt2": dict(n_embd=WIDTH, n_inner=INNER, n_head=4, n_layer=LAYERS, n_positions=LENGTH),
}
_COMMON = dict(
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=LAYERS,
    max_position_embeddings=LENGTH,
)


def make_folder(folder: Path, family: str = "llama", *, seed: int = 0, dtype=np.float32, **more):
    """Writes config.json, model.safetensors of random weights, and a tokenizer of letters."""
    from pjit_train.huggingface import weights
    from pjit_train.huggingface.config import read_config

    folder.mkdir(parents=True)
    document = {
        "model_type": family,
        "vocab_size": VOCAB,
        **_OWN.get(family, _COMMON),
        **FAMILIES[family],
        "dtype": np.dtype(dtype).name,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(document))
    found, config = read_config(folder / "config.json")
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in weights.tensor_shapes(found, config).items():
        values = rng.normal(size=shape) * (1 if "embed" in name or "wte" in name else 0.2)
        tensors[name] = (values + ("norm" in name and len(shape) == 1)).astype(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    letters = {"<unk>": 0} | {chr(96 + i): i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}\n')
    return folder


def shard(folder: Path) -> None:
    """Puts the tensors of a folder into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_text(path: Path, tokens: int = 2000, seed: int = 0) -> Path:
    """Writes a text of letters, each likely to follow from the one before."""
    rng, at, letters = np.random.default_rng(seed), 0, []
    for _ in range(tokens):
        at = (at * 5 + 3) % (VOCAB - 1) if rng.random() < 0.5 else int(rng.integers(VOCAB - 1))
        letters.append(chr(97 + at))
    path.write_text("".join(letters))
    return path


BFLOAT16 = ml_dtypes.bfloat16
