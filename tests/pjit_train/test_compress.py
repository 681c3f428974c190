"""Which kernels get which pattern, and the figures of what was pruned."""

import dataclasses

import numpy as np
import pytest

from pjit_train import compress
from pjit_train.errors import UserError
from pjit_train.transformer import TransformerConfig

MODEL = TransformerConfig(
    vocab_size=64, max_len=16, d_model=16, num_layers=2, num_heads=2, d_ff=24, use_bias=True
)
ATTENTION = [f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")]
FEED_FORWARD = [f"blocks/feed_forward/{name}/kernel" for name in ("up", "gate", "down")]


def test_by_default_the_kernels_of_attention_and_feed_forward_are_pruned_and_nothing_else():
    patterns = compress.kernel_patterns(MODEL, {compress.KERNELS: "2:4"})
    assert patterns == dict.fromkeys([*ATTENTION, *FEED_FORWARD], "2:4")


def test_the_first_expression_that_matches_counts():
    layers = {"down": "dense", "feed_forward": "1:8", "^head$": "0.5", compress.KERNELS: "2:4"}
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
        ({"query": "1:4"}, True, "only 2:4 is kept along both axes"),
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
    products = (x.T @ x).astype(np.float32)
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
    lost, whole = compress._squares(kernel, changed, (x.T @ x).astype(np.float32))
    np.testing.assert_allclose(lost, np.sum((x @ kernel - x @ changed) ** 2), rtol=1e-4)
    np.testing.assert_allclose(whole, np.sum((x @ kernel) ** 2), rtol=1e-4)


def test_violations_and_zeros_are_counted_over_all_layers_along_the_inputs():
    kernel = np.zeros((2, 4, 2, 2))  # [layers, inputs, heads, head_dim]
    kernel[0, :3, 0, 1] = 1  # three of four inputs of one output
    kernel[1, 0] = 1  # one of four inputs of four outputs
    describe = compress._describe
    found = describe("blocks/attention/query/kernel", kernel, "2:4", False, [(1.0, 4.0)] * 2)
    assert found == {"pattern": "2:4", "sparsity": 1 - 7 / 32, "violations": 1, "error": 0.5}
    # All four outputs of input 0 of layer 1 are kept: that is no 2:4 along the outputs.
    found = describe("blocks/attention/query/kernel", kernel, "2:4", True, [(0.0, 0.0)])
    assert (found["violations"], found["error"]) == (2, 0.0)
    assert describe("blocks/attention/query/kernel", kernel, "0.5", False, [(0.0, 1.0)]) == {
        "pattern": "0.5",
        "sparsity": 1 - 7 / 32,
        "violations": None,
        "error": 0.0,
    }
