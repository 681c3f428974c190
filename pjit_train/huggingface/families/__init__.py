"""Families of Hugging Face `transformers`: their keys of config.json and their tensors.

`FAMILIES` pairs, by `model_type`, Torsion's configuration with the keys of config.json, and
Torsion's parameters with the tensors of the safetensors files. `huggingface.load` and
`huggingface.save` both read it off here; a model that several families have is written as the
first one.
"""

from pjit_train.huggingface.families.gemma import GEMMA2, GEMMA3
from pjit_train.huggingface.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from pjit_train.huggingface.families.older import GPT2, OPT, VIT
from pjit_train.huggingface.families.table import ABSENT, REQUIRED, Family, Key, Tensor, find

__all__ = ["ABSENT", "FAMILIES", "REQUIRED", "Family", "Key", "Tensor", "find"]

FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "opt": OPT,
    "gpt2": GPT2,
    "vit": VIT,
}
