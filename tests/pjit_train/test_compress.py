"""Which kernels get which pattern and format, smoothing, and the figures of what was done."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from pjit_train.compression import calibrate
from pjit_train.compression import kernels as compress
from pjit_train.compression.compress import Compression
from pjit_train.errors import UserError
from pjit_train.models.roles import param_roles
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from sparsity.masks.layers import KERNELS
from sparsity.numbers.formats import format_text
from sparsity.post_training.hessian import Hessian

MODEL = TransformerConfig(
    vocab_size=64, max_len=16, d_model=16, num_layers=2, num_heads=2, d_ff=24, use_bias=True
)
ATTENTION = [f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")]
FEED_FORWARD = [f"blocks/feed_forward/{name}/kernel" for name in ("up", "gate", "down")]


def test_by_default_the_kernels_of_attention_and_feed_forward_are_pruned_and_nothing_else():
    patterns = compress.kernel_patterns(MODEL, {KERNELS: "2:4"})
    assert patterns == dict.fromkeys([*ATTENTION, *FEED_FORWARD], "2:4")


def test_the_first_expression_that_matches_counts():
    layers = {"down": "dense", "feed_forward": "1:8", "^head$": "0.5", KERNELS: "2:4"}
    patterns = compress.kernel_patterns(MODEL, layers)
    assert patterns == {
        **dict.fromkeys(ATTENTION, "2:4"),
        **dict.fromkeys(FEED_FORWARD[:2], "1:8"),
        "head": "0.5",
    }


@pytest.mark.parametrize(
    ("layers", "transposable", "says"),
    [
        ({"quary": "2:4"}, False, "'quary' matches no parameter; .*query/kernel"),
        ({"embedding": "2:4"}, False, "'embedding' matches no parameter"),
        ({"norm": "2:4"}, False, "'norm' matches no parameter"),
        ({"(": "2:4"}, False, "no regular expression"),
        ({"down": "2:5"}, False, "blocks/feed_forward/down/kernel: 24 entries .* divides 24"),
        ({"query": "5:4"}, False, "5:4: cannot keep 5 of every 4"),
        ({"query": "half"}, False, "'half' is unknown; use N:M"),
        ({"query": "0.5"}, True, "only N:M is kept along both axes"),
        ({".*": "dense"}, False, "every kernel is left dense"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(layers, transposable, says):
    with pytest.raises(UserError, match=says) as raised:
        compress.kernel_patterns(MODEL, layers, transposable=transposable)
    assert "\n" not in str(raised.value)


def test_groups_of_the_output_projection_run_over_all_of_its_heads():
    narrow = dataclasses.replace(MODEL, num_heads=2, head_dim=2)  # 4 inputs in two heads
    assert compress.kernel_patterns(narrow, {"attention/out": "1:4"})
    with pytest.raises(UserError, match="attention/out/kernel: 4 entries"):
        compress.kernel_patterns(narrow, {"attention/out": "1:8"})


def test_a_tied_head_is_no_kernel():
    tied = dataclasses.replace(MODEL, tie_head=True)
    with pytest.raises(UserError, match="'head' matches no parameter"):
        compress.kernel_patterns(tied, {"head": "2:4"})


@pytest.mark.parametrize("method", compress.METHODS)
def test_every_method_is_a_step_from_kernel_to_kernel(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 16)) * np.arange(1, 17)
    kernel = rng.normal(size=(16, 6)).astype(np.float32)
    products = Hessian.of(x.T @ x)
    pruned = np.asarray(compress.METHODS[method](kernel, products, "1:4", transposable=False))
    assert ((pruned != 0).reshape(4, 4, 6).sum(1) == 1).all()
    if method != "sparsegpt":
        scores = np.abs(kernel) * (np.linalg.norm(x, axis=0)[:, None] if method == "wanda" else 1)
        best = scores.reshape(4, 4, 6).argmax(1)
        np.testing.assert_array_equal((pruned != 0).reshape(4, 4, 6).argmax(1), best)
        np.testing.assert_array_equal(pruned[pruned != 0], kernel[pruned != 0])


def test_the_error_is_that_of_the_outputs():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(50, 8)), rng.normal(size=(8, 3))
    changed = np.where(rng.random((8, 3)) < 0.5, 0, kernel)
    lost, whole = compress.squares(kernel, changed, Hessian.of(x.T @ x))
    np.testing.assert_allclose(lost, np.sum((x @ kernel - x @ changed) ** 2), rtol=1e-4)
    np.testing.assert_allclose(whole, np.sum((x @ kernel) ** 2), rtol=1e-4)


def test_errors_of_layers_are_taken_together():
    assert compress.relative_error([(1.0, 4.0), (0.0, 12.0)]) == 0.25
    assert compress.relative_error([(-1e-9, 4.0)]) == 0  # what rounding makes of 0
    assert compress.relative_error([(0.0, 0.0)]) == 0


def test_violations_are_counted_over_all_layers_along_the_inputs():
    kernel = np.zeros((2, 4, 2, 2))  # [layers, inputs, heads, head_dim]
    kernel[0, :3, 0, 1] = 1  # three of four inputs of one output
    kernel[1, 0] = 1  # one of four inputs of four outputs
    role = param_roles(MODEL)["blocks/attention/query/kernel"]
    assert compress.violations(role, kernel, "2:4") == 1
    # All four outputs of input 0 of layer 1 are kept: that is no 2:4 along the outputs.
    assert compress.violations(role, kernel, "2:4", transposable=True) == 2
    assert compress.violations(role, kernel, "0.5") is None


@pytest.mark.parametrize(
    ("format", "pattern", "zeros", "packed"),
    [
        (None, None, 4 * 3 * 64 * 10, 4 * 3 * 64 * 10),
        (None, "2:4", 7680, 3840 + 1920 // 2 // 4),  # two bits for each of 960 kept
        ("int4", None, 960 + 3 * 10 * 4, 960 + 120),  # a float32 scale for each output
        ("int4:32", None, 960 + 3 * 2 * 10 * 4, 960 + 240),
        ("int8:tensor", "0.5", 1920 + 3 * 4, 1920 + 12),
        ("fp8_e4m3", None, 1920 + 120, 1920 + 120),
        ("mxfp8_e4m3", "1:4", 1920 + 60, 480 + 480 * 2 // 8 + 60),  # a byte for each block
        ("mxfp6_e3m2", None, 1440 + 60, 1440 + 60),
        ("mxfp4_e2m1", "2:4", 960 + 60, 480 + 240 + 60),
        ("nvfp4", "1:8", 960 + 3 * 4 * 10 + 3 * 4, 120 + 90 + 132),  # three bits each
        ("hbfp6", None, 1440 + 30, 1440 + 30),
    ],
)
def test_bytes_are_those_of_elements_scales_and_places(format, pattern, zeros, packed):
    parsed = None if format is None else compress.parse_format(format)
    found = compress.kernel_bytes((3, 64, 10), parsed, pattern, 4)
    assert found == {"zeros": zeros, "packed": packed}


def test_formats_of_kernels_by_the_first_expression_that_matches():
    layers = {"down": "dense", "feed_forward": "mxfp4_e2m1:8", KERNELS: "int4"}
    assert compress.kernel_formats(MODEL, layers) == {
        **dict.fromkeys(ATTENTION, "int4"),
        **dict.fromkeys(FEED_FORWARD[:2], "mxfp4_e2m1:8"),
    }


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"quary": "int4"}, "'quary' matches no parameter; .*query/kernel"),
        ({"query": "int9"}, "unknown format 'int9'; use one of int4, int8.* did you mean int"),
        ({"query": "int4:x"}, "block='x'; use a whole number from 1 to 2147483647"),
        ({"query": "int4:0"}, "block=0; use a whole number from 1 to 2147483647"),
        ({"query": "nvfp4:channel"}, "block='channel'; use a whole number from 1 to 2147483647"),
        ({"query": "hbfp6:asymmetric"}, "hbfp6:asymmetric: a zero point is of integers; use int4"),
        ({"query": "int4:asymetric"}, "block='asymetric'; use a whole number from 1 to 2147483647"),
        ({"query": "mxfp8_e4m3"}, "query/kernel: 16 entries are not cut into blocks of 32; .* 16"),
        ({".*": "dense"}, "every kernel is left dense; give at least one a format"),
    ],
)
def test_a_format_that_cannot_be_is_told_in_one_line(layers, says):
    with pytest.raises(UserError, match=says) as raised:
        compress.kernel_formats(MODEL, layers)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("int4", "int4"),
        ("int4:128", "int4:128"),
        ("int4:asymmetric", "int4:asymmetric"),
        ("int4:asym", "int4:asymmetric"),
        ("int3", "int3"),
        ("int5:64:asym", "int5:64:asymmetric"),
        ("int2:asym:tensor", "int2:tensor:asymmetric"),
        ("mxfp6_e3m2:16", "mxfp6_e3m2:16"),
        ("int8:tensor:asymmetric", "int8:tensor:asymmetric"),
        ("fp8_e4m3", "fp8_e4m3:channel"),
        ("nvfp4", "nvfp4"),
    ],
)
def test_a_format_is_shown_as_it_is_written(text, shown):
    format = compress.parse_format(text)
    assert format_text(format) == shown
    assert compress.parse_format(shown) == format


BOTH = {"patterns": {"head": "2:4"}, "formats": {"head": "int4"}}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing is pruned or quantized"),
        (
            {**BOTH, "method": "wander"},
            "method='wander' is unknown; use magnitude, wanda or",
        ),
        ({**BOTH, "quantizer": "awq"}, "quantizer='awq' is unknown; use rtn or gptq"),
        ({**BOTH, "order": "both"}, "order='both' is unknown; use sparsify_then_quantize"),
        ({**BOTH, "smooth": 2.0}, "smooth=2.0; use a number from 0 to 1"),
        ({**BOTH, "finetune": -1}, "finetune=-1; use a whole number from 0 to 2147483647"),
        ({**BOTH, "order": "quantize_then_sparsify"}, "sparsegpt moves weights"),
        (
            {**BOTH, "order": "quantize_then_sparsify", "method": "wanda", "finetune": 3},
            "fine-tuning trains what pruning left",
        ),
        ({"formats": {"head": "int4"}, "finetune": 3}, "fine-tuning trains what pruning left"),
    ],
)
def test_parts_that_do_not_go_together_are_one_line(options, says):
    with pytest.raises(UserError, match=says) as raised:
        Compression(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_the_smoothed_model_computes_the_same(norm):
    activation = "swiglu" if norm == "rmsnorm" else "gelu"
    config = dataclasses.replace(
        MODEL, norm=norm, num_kv_heads=1, activation=activation, init_std=0.3
    )
    graph, state = nnx.split(config.build(jax.random.key(0), Rules()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.array(x + 0.3 * rng.normal(size=x.shape), np.float32),
        nnx.to_pure_dict(state),
    )
    params["blocks"]["attention_norm"]["scale"][:, 3] = 50  # an outlier of the activations
    before = jax.tree.map(np.copy, params)
    batches = [{"inputs": rng.integers(0, 64, size=(2, 16))} for _ in range(2)]
    maxima = calibrate.input_maxima(graph, params, batches)
    smoothed = compress.smooth(param_roles(config), params, maxima, 0.5)
    jax.tree.map(np.testing.assert_array_equal, params, before)

    expected = nnx.merge(graph, params)(batches[0]["inputs"])
    found = nnx.merge(graph, smoothed)(batches[0]["inputs"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    after = calibrate.input_maxima(graph, smoothed, batches)
    for part, names in (("attention", ("query", "key", "value")), ("feed_forward", ("up",))):
        for layer in range(config.num_layers):
            name = f"blocks/{part}/{names[0]}/kernel"
            weights = np.max(
                [
                    np.abs(smoothed["blocks"][part][n]["kernel"][layer].reshape(16, -1)).max(1)
                    for n in (*names, *["gate"] * ("gate" in params["blocks"][part]))
                ],
                axis=0,
            )
            np.testing.assert_allclose(after[name][layer], weights, rtol=1e-3)
    for name in ("blocks/attention/out/kernel", "blocks/feed_forward/down/kernel"):
        np.testing.assert_allclose(after[name], maxima[name], rtol=1e-3)
        np.testing.assert_array_equal(compress.leaf(smoothed, name), compress.leaf(params, name))
