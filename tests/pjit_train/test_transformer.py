"""The model: what a token sees, how it begins, and that scans and remat change no number."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import GPT2, LLAMA, T, V
from hypothesis import given, settings
from hypothesis import strategies as st

from pjit_train.errors import UserError
from pjit_train.models.blocks import rotary_angles
from pjit_train.models.loss import cross_entropy
from pjit_train.models.transformer import TransformerConfig, count_params
from pjit_train.sharding import Rules
from pjit_train.step import split_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
TOKENS = np.random.default_rng(0).integers(0, V, (2, T)).astype(np.int32)
# Large enough that every position and token changes the logits visibly.
LOUD = {"init_std": 0.3, "position_init_std": 0.3}
MODELS = {
    "llama": dataclasses.replace(LLAMA, **LOUD),
    "gpt2": dataclasses.replace(GPT2, **LOUD, norm_epsilon=1e-4, scale_residual_init=True),
}


class Built:
    """A model on one device, without a mesh; its logits as one compiled function."""

    def __init__(self, config: TransformerConfig):
        self.config = config
        self.params = nnx.to_pure_dict(nnx.state(config.build(jax.random.key(0), Rules())))
        self.graph, _ = split_model(config, Rules())
        self.logits = jax.jit(self.apply)

    def apply(self, params, tokens, segments=None):
        return nnx.merge(self.graph, params)(tokens, segments)

    def __call__(self, tokens, segments=None):
        return np.asarray(self.logits(self.params, tokens, segments))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return Built(MODELS[request.param])


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, T - 2), seed=st.integers(0, 1000))
def test_logits_do_not_depend_on_later_tokens(model, position, seed):
    changed = TOKENS.copy()
    later = np.random.default_rng(seed).integers(1, V, (2, T - position - 1))
    changed[:, position + 1 :] = (changed[:, position + 1 :] + later) % V
    before, after = model(TOKENS), model(changed)
    np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
    assert np.all(np.any(after[:, position + 1 :] != before[:, position + 1 :], axis=-1))


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, T - 1), seed=st.integers(0, 1000))
def test_segments_keep_documents_apart(model, cut, seed):
    segments = np.where(np.arange(T) < cut, 1, 2) * np.ones((2, 1), np.int32)
    changed = TOKENS.copy()
    changed[:, :cut] = np.random.default_rng(seed).integers(0, V, (2, cut))
    before, after = model(TOKENS, segments), model(changed, segments)
    np.testing.assert_array_equal(after[:, cut:], before[:, cut:])
    np.testing.assert_array_equal(before[:, :cut], model(TOKENS)[:, :cut])


def test_rotary_positions_are_relative():
    """A document behind another one gives the logits that it gives at the start of a row."""
    llama = Built(MODELS["llama"])
    cut = T // 3
    segments = np.where(np.arange(T) < cut, 1, 2) * np.ones((2, 1), np.int32)
    alone = np.concatenate([TOKENS[:, cut:], TOKENS[:, :cut]], axis=1)
    behind, first = llama(TOKENS, segments)[:, cut:], llama(alone)[:, : T - cut]
    np.testing.assert_allclose(behind, first, rtol=1e-4, atol=1e-4)
    # and order matters: swapping two earlier tokens changes what a later one sees
    swapped = TOKENS.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert np.all(TOKENS[:, 0] != TOKENS[:, 1])
    assert np.max(np.abs(llama(swapped)[:, -1] - llama(TOKENS)[:, -1])) > 1e-3


@settings(max_examples=30, deadline=None)
@given(
    factor=st.floats(1, 64),
    low=st.floats(0.25, 4),
    ratio=st.floats(1.1, 8),
    original=st.integers(64, 16384),
)
def test_scaled_rotary_frequencies_are_those_of_llama_3_1(factor, low, ratio, original):
    """By wavelength, case for case, as the model's report and its first code have them."""
    high, head_dim, theta = low * ratio, 32, 500_000.0
    want = []
    for pair in range(head_dim // 2):
        frequency = theta ** (-2 * pair / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low:
            frequency /= factor
        elif wavelength > original / high:
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        want.append(frequency)
    _, sines = rotary_angles(np.array([0, 1]), head_dim, theta, (factor, low, high, original))
    # The angles of position 1 are the frequencies, all at most 1.
    np.testing.assert_allclose(np.arcsin(sines[1]), want, rtol=2e-4)


def test_released_llama_3_1_frequencies():
    """Of 64 pairs the first 29 stay and the last 29 turn eight times more slowly."""
    at = np.array([1])
    scaled = np.arcsin(rotary_angles(at, 128, 5e5, (8.0, 1.0, 4.0, 8192))[1][0])
    plain = np.arcsin(rotary_angles(at, 128, 5e5)[1][0])
    ratio = plain / scaled
    assert np.all(ratio[:29] == 1)
    assert np.all((ratio[29:35] > 1) & (ratio[29:35] < 8))
    np.testing.assert_allclose(ratio[35:], 8, rtol=1e-4)


def test_the_model_turns_by_its_scaled_frequencies():
    llama = Built(MODELS["llama"])
    for scaling, same in (((1.0, 1.0, 4.0, 8), True), ((4.0, 1.0, 4.0, 8), False)):
        scaled = Built(dataclasses.replace(MODELS["llama"], rope_scaling=scaling))
        difference = np.max(np.abs(scaled(TOKENS) - llama(TOKENS)))
        assert difference < 1e-4 if same else difference > 1e-2


def test_position_offset_leaves_the_first_rows_of_the_table_unused():
    offset = Built(dataclasses.replace(MODELS["gpt2"], position_offset=3))
    plain = Built(dataclasses.replace(MODELS["gpt2"], position_offset=0))
    table = offset.params["position_embedding"]
    assert table.shape == (T + 3, GPT2.d_model)
    plain.params = {**offset.params, "position_embedding": table[3:]}
    np.testing.assert_array_equal(offset(TOKENS), plain(TOKENS))


@pytest.mark.slow
def test_logits_and_gradients_are_alike_whatever_the_loop_and_remat():
    """`layers` and `remat` choose how the numbers are made, not which."""

    def loss_and_gradient(config):
        graph, _ = split_model(config, Rules())

        def loss(params):
            model = nnx.merge(graph, params)
            hidden, _ = model.hidden(TOKENS)
            return cross_entropy(hidden, model.head_kernel(), np.roll(TOKENS, -1, axis=1)) / 48

        return jax.jit(jax.value_and_grad(loss))(params)

    config = MODELS["gpt2"]
    params = Built(config).params
    want, want_gradient = loss_and_gradient(config)
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(want_gradient))
    for change in (
        {"layers": "unroll"},
        {"remat": "dots"},
        {"remat": "full"},
    ):
        got, gradient = loss_and_gradient(dataclasses.replace(config, **change))
        np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=str(change))
        jax.tree.map(
            lambda g, w, change=change: np.testing.assert_allclose(
                g, w, rtol=1e-4, atol=1e-6 * scale, err_msg=str(change)
            ),
            gradient,
            want_gradient,
        )


def test_full_remat_keeps_less_for_the_backward_pass():
    def kept(remat):
        config = dataclasses.replace(LLAMA, num_layers=8, max_len=512, remat=remat)
        graph, abstract = split_model(config, Rules())

        def loss(params):
            return jnp.sum(nnx.merge(graph, params).hidden(np.zeros((4, 512), np.int32))[0])

        compiled = jax.jit(jax.grad(loss)).lower(nnx.to_pure_dict(abstract)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept("full") < 0.6 * kept("none")


def test_bfloat16_is_within_its_rounding_of_float32(model):
    low = Built(dataclasses.replace(model.config, dtype="bfloat16"))
    low.params = model.params
    got, want = low(TOKENS), model(TOKENS)
    assert got.dtype == np.float32
    hidden, _ = nnx.merge(low.graph, low.params).hidden(TOKENS)
    assert hidden.dtype == jnp.bfloat16
    assert 0 < np.max(np.abs(got - want)) < 0.1 * np.max(np.abs(want))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_new_model_knows_nothing(config):
    """Its loss is that of the uniform distribution over the vocabulary."""
    logits = Built(config)(TOKENS)
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    loss = -float(np.mean(log_p))  # over all targets alike
    assert math.log(V) < loss < math.log(V) + 0.01


def test_parameters_begin_with_the_configured_spread():
    config = dataclasses.replace(
        GPT2, d_model=96, d_ff=200, num_layers=4, vocab_size=300, init_std=0.05,
        position_init_std=0.01, max_len=200, scale_residual_init=True, tie_head=False,
    )  # fmt: skip
    params = Built(config).params
    block = params["blocks"]
    attention, feed_forward = block["attention"], block["feed_forward"]
    residual = 0.05 / math.sqrt(2 * 4)
    for kernel, std in [
        (attention["query"]["kernel"], 0.05),
        (attention["key"]["kernel"], 0.05),
        (attention["value"]["kernel"], 0.05),
        (attention["out"]["kernel"], residual),
        (feed_forward["up"]["kernel"], 0.05),
        (feed_forward["down"]["kernel"], residual),
        (params["embedding"], 0.05),
        (params["position_embedding"], 0.01),
        (params["head"], 0.05),
    ]:
        assert float(jnp.std(kernel)) == pytest.approx(std, rel=0.05)
        assert float(jnp.mean(kernel)) == pytest.approx(0, abs=0.05 * std)
    assert not np.any(attention["query"]["kernel"][0] == attention["query"]["kernel"][1])
    for module in (attention["query"], attention["out"], feed_forward["up"], params["norm"]):
        assert not np.any(module["bias"])
    assert np.all(params["norm"]["scale"] == 1)


GPT2_LIKE = {"norm": "layernorm", "use_bias": True, "positions": "learned", "tie_head": True}
OPT = GPT2_LIKE | {"vocab_size": 50272, "max_len": 2048, "position_offset": 2, "activation": "relu"}


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (
            GPT2_LIKE
            | dict(vocab_size=50257, max_len=1024, activation="gelu_tanh")
            | dict(d_model=768, num_layers=12, num_heads=12, d_ff=3072),
            124_439_808,
        ),
        (OPT | dict(d_model=768, num_layers=12, num_heads=12, d_ff=3072), 125_239_296),
        (OPT | dict(d_model=4096, num_layers=32, num_heads=32, d_ff=16384), 6_658_473_984),
        (
            dict(vocab_size=128256, max_len=8192, d_model=4096, num_layers=32, num_heads=32)
            | dict(num_kv_heads=8, d_ff=14336),
            8_030_261_248,
        ),
    ],
    ids=["gpt2", "opt_125m", "opt_6_7b", "llama3_8b"],
)
def test_parameters_are_as_many_as_published(shape, published):
    _, params = split_model(TransformerConfig(**shape), Rules())
    assert count_params(nnx.to_pure_dict(params)) == published


def test_flops_are_those_counted_by_hand():
    # Per token and layer, multiplications forward, for LLAMA above (d_model 32, 4 heads and 2 key-
    # value heads of 6, feed-forward 40):
    #   query and out 2 * 32 * 24 = 1536; key and value 2 * 32 * 12 = 768; gate, up, down
    #   3 * 32 * 40 = 3840; in all 6144, the elements of its kernels.
    #   Rows see (1 + ... + 24) / 24 = 12.5 columns on average; logits and sums over values take 24
    #   multiplications a column each: 2 * 24 * 12.5 = 600.
    # Three layers, and the head 32 * 56 = 1792: 3 * 6744 + 1792 = 22024. Twice that for the
    # additions, and the backward pass is twice the forward: times 6.
    assert LLAMA.flops_per_token(24) == 6 * 22024
    # Two layers, of as many key-value heads as heads and of two matrices in the feed-forward:
    # 4 * 32 * 24 + 2 * 32 * 40 = 5632 each.
    assert GPT2.flops_per_token(24) == 6 * (2 * (5632 + 600) + 1792)
    # The rule of thumb, 6 N a token for N parameters in matmuls (Kaplan et al., 2020).
    kernels = 12 * 768 * 768 * 12 + 768 * 50257
    config = TransformerConfig(
        vocab_size=50257, max_len=1024, d_model=768, num_layers=12, num_heads=12, d_ff=3072,
        activation="relu",
    )  # fmt: skip
    attention = 6 * 12 * 768 * 1025
    assert config.flops_per_token(1024) == 6 * kernels + attention


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"num_kv_heads": 3},
            "model: num_kv_heads=3 does not divide num_heads=4; use a divisor of 4",
        ),
        (
            {"num_heads": 5, "num_kv_heads": None, "head_dim": None},
            "model: num_heads=5 does not divide d_model=32; use a divisor, or say head_dim",
        ),
        (
            {"head_dim": 5},
            "model: head_dim=5 is odd; rotary positions need pairs",
        ),
        (
            {"rope_scaling": (8.0, 4.0, 4.0, 8192)},
            "model: rope_scaling=(8.0, 4.0, 4.0, 8192) must be (factor >= 1, low, "
            "high > low, original length), or (factor >= 1,)",
        ),
        (
            {"rope_scaling": (float("nan"), 1.0, 4.0, 8192)},
            "TransformerConfig.rope_scaling[0]=nan; use a number from 1.18e-38 to 3.4e38",
        ),
        (
            {"rope_scaling": [8.0, 1.0, 4.0, 8192], "positions": "learned"},
            "model: rope_scaling=(8.0, 1.0, 4.0, 8192) is of rotary positions and "
            "positions='learned'; use rope_scaling=None",
        ),
        ({"positions": "alibi"}, "model: positions='alibi' is unknown; use rope or learned"),
        ({"norm": "rms"}, "model: norm='rms' is unknown; use rmsnorm or layernorm"),
        ({"remat": "all"}, "model: remat='all' is unknown; use none, dots or full"),
        ({"dtype": "bf16"}, "model: dtype='bf16' is unknown; use float32, bfloat16 or float16"),
    ],
)
def test_mistakes_are_one_line(change, says):
    with pytest.raises(UserError) as error:
        dataclasses.replace(LLAMA, **change)
    assert str(error.value) == says
