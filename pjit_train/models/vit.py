"""A vision transformer (Dosovitskiy et al., 2021) made of the language models' blocks."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from pjit_train.errors import UserError
from pjit_train.models.block_config import Activation, BlockConfig
from pjit_train.models.blocks import Block, Norm, run_layers
from pjit_train.models.parameters import Initializer, gathered
from pjit_train.models.projection import Dense
from pjit_train.models.roles import Role
from pjit_train.sharding import Rules, out_sharding
from sparsity.ranges import Count, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(BlockConfig):
    """Configuration of a vision transformer that classifies square images.

    Attributes:
      image_size: height and width of an image, in pixels.
      patch_size: height and width of a patch, in pixels; divides image_size.
      channels: of an image.
      num_classes: outputs of the head.
    """

    image_size: Count
    patch_size: Count
    num_classes: Count
    channels: Count = 3
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_epsilon: Positive = 1e-12
    activation: Activation = "gelu"
    use_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise UserError(
                f"model: patch_size={self.patch_size} does not divide "
                f"image_size={self.image_size}; use a divisor of {self.image_size}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_params(self) -> int:
        """Elements of all parameters of the built model."""
        pixels = self.patch_size**2 * self.channels
        tokens = self.num_patches + 1 + 1  # their positions, and the class token
        ends = self.d_model * (pixels + tokens + self.num_classes)
        ends += self.d_model + self.num_classes if self.use_bias else 0
        return ends + self.num_layers * self.num_block_params + self.num_norm_params

    @property
    def flops_per_image(self) -> float:
        """Floating-point operations of a training step for an image: 3 forward passes, no remat."""
        tokens = self.num_patches + 1
        ends = self.num_patches * self.patch_size**2 * self.channels + self.num_classes
        blocks = tokens * self.num_layers * self.block_products(tokens)
        return 6.0 * (blocks + ends * self.d_model)

    def build(self, key: jax.Array, rules: Rules) -> "ViT":
        return ViT(self, key, rules)


class ViT(nnx.Module):
    """Patches and a class token, a stack of blocks, and a head on the class token's output."""

    def __init__(self, config: ViTConfig, key: jax.Array, rules: Rules):
        c = self.config = config
        # One class token more than patches: their number has no divisor worth splitting over.
        self.rules = rules = dataclasses.replace(rules, length=())
        init = Initializer(key, rules, c.param_dtype)
        D, p = c.d_model, c.patch_size
        made: dict[str, Any] = dict(std=c.init_std, config=c, init=init)
        pixels = (p, p, c.channels, D), (None, None, None, "embed")
        self.patches = Dense("btpqc,pqcd->btd", *pixels, **made)
        self.class_token = init.normal((D,), (None,), Role(kind="token"), c.init_std)
        positions = (c.num_patches + 1, D), (None, "embed"), Role(kind="positions", inputs=(-2,))
        self.position_embedding = init.normal(*positions, c.init_std)
        self.blocks = Block(c, init.stacked(c.num_layers))
        self.norm = Norm(c, init)
        self.head = Dense("bd,dc->bc", (D, c.num_classes), ("embed", None), **made)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Logits of the classes, float32 [batch, num_classes]; arguments are those of `body`."""
        return self.classify(self.body(images_BHWC))

    def classify(self, x_BTD: jax.Array) -> jax.Array:
        """Logits of the classes, float32 [batch, num_classes], from what `body` gives."""
        return self.head(self.norm(x_BTD[:, 0])).astype(jnp.float32)

    def body(self, images_BHWC: jax.Array) -> jax.Array:
        """The output of the last block [batch, patches + 1, d_model], the class token first.

        Args:
          images_BHWC: [batch, image_size, image_size, channels], normalised as the weights expect.

        Raises:
          ValueError: the images have another size or other channels.
        """
        c = self.config
        if images_BHWC.shape[1:] != (c.image_size, c.image_size, c.channels):
            raise ValueError(
                f"ViT: images are {images_BHWC.shape}; they must be [batch, {c.image_size}, "
                f"{c.image_size}, {c.channels}]"
            )
        x_BTD = self.patches(split_patches(jnp.asarray(images_BHWC, c.dtype), c.patch_size))
        table_TD = gathered(self.position_embedding, self.rules, c.dtype)
        table_TD = table_TD.at[0].add(gathered(self.class_token, self.rules, c.dtype))
        x_BTD = jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0))) + table_TD
        return run_layers(self.blocks, x_BTD, c, [{"causal": False}])[0]


def split_patches(images_BHWC: jax.Array, patch_size: int) -> jax.Array:
    """[batch, patches, patch_size, patch_size, channels], the patches row by row."""
    B, H, W, C = images_BHWC.shape
    p, spec = patch_size, out_sharding(P(jax.typeof(images_BHWC).sharding.spec[0]))
    grid = images_BHWC.reshape((B, H // p, p, W // p, p, C), out_sharding=spec)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape((B, -1, p, p, C), out_sharding=spec)
