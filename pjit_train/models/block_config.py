"""The shape of a stack of blocks, and how it is computed: what all models' configurations share."""

import dataclasses
import math
from typing import Literal

from pjit_train.attention.dispatch import Way
from pjit_train.errors import UserError
from pjit_train.models.model_config import ModelConfig
from pjit_train.models.parameters import Dtype
from sparsity.ranges import Count, NonNegative, Positive, check_choice, check_fields

Activation = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(ModelConfig):
    """Shape of a block and of the stack of them; every model's configuration adds to it.

    Attributes:
      num_kv_heads: None for as many as there are query heads.
      head_dim: None for d_model / num_heads.
      norm: scale only by the root mean square, or subtract the mean and add a bias as well.
      norm_placement: norms of what attention and feed-forward read ("pre"), of what they give
        ("post", OLMo 2), or of both (Gemma 2).
      norm_unit_offset: norms scale by 1 + their parameter (Gemma).
      qk_norm: norms of queries and keys before they are rotated: of each head by itself ("head",
        Qwen3), or of all heads together ("all", OLMo 2).
      activation: "swiglu" multiplies silu(x W_gate) and x W_up, "geglu" gelu_tanh(x W_gate) and
        x W_up; "gelu" is exact, "gelu_tanh" GPT-2's.
      use_bias: biases of all matmuls of the blocks; `qkv_bias` only of those that give queries,
        keys and values (Qwen2).
      init_std: standard deviation of kernels and embeddings.
      scale_residual_init: divide the std of kernels that write to the residual stream by
        sqrt(2 num_layers) (GPT-2 and Megatron).
      layers: "scan" compiles one block and loops; "unroll" compiles each, faster on CPU. The
        parameters are the same.
      remat: what the backward pass makes again: nothing but gathered parameters, all but the
        outputs of matmuls with parameters ("dots"), or the whole block ("full").
      attention: the implementation (`way`), and its scale, softcap, tile_rows, measured and
        sequence, of `attention.attention`.
      dtype: of activations and matmuls; param_dtype: of parameters and so of optimizer state.
    """

    d_model: Count
    num_layers: Count
    num_heads: Count
    d_ff: Count
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: Positive = 1e-5
    norm_placement: Literal["pre", "post", "both"] = "pre"
    norm_unit_offset: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    activation: Activation = "swiglu"
    use_bias: bool = False
    qkv_bias: bool = False
    init_std: NonNegative = 0.02
    scale_residual_init: bool = False
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Way = "auto"
    attention_scale: Positive | None = None
    attention_softcap: Positive | None = None
    attention_tile_rows: Count | None = None
    attention_measured: bool = False
    attention_sequence: Literal["gather", "ring"] = "gather"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    def __post_init__(self):
        check_fields(self, UserError)
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise UserError(
                f"model: num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}; "
                f"use a divisor of {self.num_heads}"
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise UserError(
                f"model: num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                "use a divisor, or say head_dim"
            )
        object.__setattr__(self, "num_kv_heads", kv_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.d_model // self.num_heads)
        choices = {
            "norm": ("rmsnorm", "layernorm"),
            "norm_placement": ("pre", "post", "both"),
            "qk_norm": ("none", "head", "all"),
            "activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu"),
            "layers": ("scan", "unroll"),
            "remat": ("none", "dots", "full"),
            "attention": ("auto", "rows", "flat", "splash", "cudnn"),
            "attention_sequence": ("gather", "ring"),
            "dtype": ("float32", "bfloat16", "float16"),
            "param_dtype": ("float32", "bfloat16", "float16"),
        }
        for name, values in choices.items():
            check_choice(f"model: {name}", getattr(self, name), values, UserError)

    @property
    def residual_std(self) -> float:
        return self.init_std / (math.sqrt(2 * self.num_layers) if self.scale_residual_init else 1)

    @property
    def period(self) -> int:
        """Number of layers after which their kinds repeat."""
        return 1

    @property
    def gated(self) -> bool:
        """Tells whether the feed-forward has a matmul of a gate."""
        return self.activation in ("swiglu", "geglu")

    def block_products(self, columns: float) -> float:
        """Multiplications of one token in the matmuls of a block, forward.

        Args:
          columns: tokens that a token attends to, on average.
        """
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = self.d_model * (2 * query + 2 * kv)
        feed_forward = self.d_model * self.d_ff * (3 if self.gated else 2)
        return projections + feed_forward + 2 * query * columns  # logits and attend

    @property
    def num_norm_params(self) -> int:
        """Number of parameters of one norm of the residual stream's width."""
        return self.d_model * self._params_of_norm

    @property
    def _params_of_norm(self) -> int:
        """Parameters of a norm for each of its features."""
        return 2 if self.norm == "layernorm" else 1

    @property
    def num_block_params(self) -> int:
        """Number of parameters of one block."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        wide = 2 if self.gated else 1  # matmuls into the feed-forward width
        kernels = self.d_model * (2 * query + 2 * kv + (wide + 1) * self.d_ff)
        biases = query + 2 * kv if self.use_bias or self.qkv_bias else 0
        biases += wide * self.d_ff + 2 * self.d_model if self.use_bias else 0
        norms = (4 if self.norm_placement == "both" else 2) * self.num_norm_params
        of_heads = {"none": 0, "head": 2 * self.head_dim, "all": query + kv}[self.qk_norm]
        return kernels + biases + norms + of_heads * self._params_of_norm
