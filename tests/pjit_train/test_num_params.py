"""The number of a model's parameters by formula, against the model that is built."""

import functools

import jax
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pjit_train.models.transformer import TransformerConfig, count_params
from pjit_train.models.vit import ViTConfig
from pjit_train.sharding import Rules

SMALL = st.integers(1, 5)


@st.composite
def blocks(draw):
    kv_heads, group = draw(SMALL), draw(SMALL)
    return dict(
        d_model=draw(st.integers(1, 40)),
        num_layers=draw(SMALL),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(SMALL),
        d_ff=draw(st.integers(1, 40)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        norm_placement=draw(st.sampled_from(["pre", "post", "both"])),
        qk_norm=draw(st.sampled_from(["none", "head", "all"])),
        activation=draw(st.sampled_from(["swiglu", "geglu", "gelu", "gelu_tanh", "relu"])),
        use_bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )


def built(config) -> int:
    model = nnx.eval_shape(functools.partial(config.build, jax.random.key(0), Rules()))
    return count_params(nnx.state(model, nnx.Param))


@settings(max_examples=40, deadline=None)
@given(
    blocks(),
    st.booleans(),
    st.sampled_from(["rope", "learned"]),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 3),
)
def test_a_language_model_has_as_many_parameters_as_it_says(
    block, tie_head, positions, vocab_size, max_len, offset
):
    config = TransformerConfig(
        **block,
        tie_head=tie_head,
        positions=positions,
        vocab_size=vocab_size,
        max_len=max_len,
        position_offset=offset,
    )
    assert config.num_params == built(config)


@settings(max_examples=25, deadline=None)
@given(blocks(), SMALL, SMALL, SMALL, st.integers(1, 30))
def test_a_vision_transformer_has_as_many_parameters_as_it_says(
    block, patches, patch_size, channels, classes
):
    config = ViTConfig(
        **block,
        image_size=patches * patch_size,
        patch_size=patch_size,
        channels=channels,
        num_classes=classes,
    )
    assert config.num_params == built(config)


def test_a_vision_transformer_of_the_paper_has_its_number():
    """ViT-B/16 for ImageNet, as published with its weights: 86,567,656."""
    config = ViTConfig(
        d_model=768,
        num_layers=12,
        num_heads=12,
        d_ff=3072,
        image_size=224,
        patch_size=16,
        num_classes=1000,
    )
    assert config.num_params == 86_567_656
