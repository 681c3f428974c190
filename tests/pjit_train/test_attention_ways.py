"""Every way to run attention against the row-tiled one, which test_attention holds to float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_reference import gradients, random, reference, reference_gradients
from helpers.collectives import collectives
from jax.sharding import PartitionSpec as P

from pjit_train.attention import attention
from pjit_train.attention import kernels as attention_kernels
from pjit_train.attention.flat import attend_flat
from pjit_train.attention.masks import Mask
from pjit_train.errors import UserError
from pjit_train.sharding import MeshShape, make_mesh


def ids(length, seed=1, batch=2):
    return np.sort(np.random.default_rng(seed).integers(0, 3, (batch, length)))


@pytest.fixture
def cudnn(monkeypatch):
    """As on a machine with cuDNN; programs for its devices can be made without any.

    A function that lets JAX find what another gives in place of the version, 9.11.0 at first.
    """
    # JAX's own; an AttributeError here says that it is elsewhere now.
    check = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    finds = functools.partial(monkeypatch.setattr, check)
    finds(lambda: 91100)
    return finds


FLAT = [
    (37, 150, {}),
    (140, 140, {"causal": True}),
    (300, 300, {"causal": True, "window": 40}),
    (50, 200, {"causal": True, "row_offset": 130, "segments": (ids(50), ids(200))}),
]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize(("rows", "columns", "options"), FLAT)
def test_flat_kernel_is_the_definition(rows, columns, options, target):
    """Interpreted: ragged lengths, grouped heads, chunks that the mask empties, rows of zeros."""
    q, k, v = random(0, (2, rows, 4, 24), *[(2, columns, 2, 24)] * 2)
    place = {"row_offset": 0, "segments": None} | options
    mask = Mask(options.get("causal", False), options.get("window"), None, "segments" in options)
    attend = lambda q, k, v: attend_flat(
        q, k, v, place["segments"], place["row_offset"], mask, 24, interpret=target
    )
    out, grads = jax.jit(functools.partial(gradients, attend))(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, **options), rtol=1e-5, atol=1e-5)
    want = reference_gradients(q, k, v, random(99, q.shape)[0], **options)
    for g, w in zip(grads, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=2e-5)


def test_flat_is_interpreted_on_a_cpu():
    q, k, v = random(0, *[(1, 40, 2, 8)] * 3)
    out = attention(q, k, v, causal=True, way="flat", tile_rows=16)
    np.testing.assert_allclose(out, reference(q, k, v, causal=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "options"), [(64, {"causal": True}), (40, {"window": 70})])
def test_flat_kernel_becomes_a_program_for_a_gpu(cudnn, dtype, size, options):
    """Of Triton, in one kernel; sizes that are no powers of two, documents."""
    array = jax.ShapeDtypeStruct
    q, k = (array((2, n, h, size), dtype) for n, h in ((200, 4), (300, 2)))
    documents = array((2, 200), "int32"), array((2, 300), "int32")
    attend = lambda q, k, v, *ids: attention(q, k, v, segments=ids, way="flat", **options)
    program = jax.jit(attend).trace(q, k, k, *documents).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("custom_call @__gpu$xla.gpu.triton") == 1


SPLASH = [
    {"causal": True, "documents": True},
    {"causal": True, "window": 40},
    {"causal": True, "window": 1},
    {"documents": True},
    {"columns": 256},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", SPLASH, ids=str)
def test_splash_kernel_is_the_definition(options):
    """JAX's kernel, interpreted, as this project calls it: heads in groups, scale, documents."""
    options = dict(options)
    documents, columns = options.pop("documents", False), options.pop("columns", 128)
    q, k, v = random(0, (1, 128, 4, 32), *[(1, columns, 2, 32)] * 2)
    segments = (ids(128, batch=1),) * 2 if documents else None
    mask = Mask(options.get("causal", False), options.get("window"), 0, documents)
    assert attention_kernels.splash_misfit(q, k, segments, mask) is None
    attend = functools.partial(
        attention_kernels.attend_splash, segments=segments, mask=mask, interpret=True
    )
    out, grads = jax.jit(functools.partial(gradients, attend))(q, k, v)
    options |= {"segments": segments}
    np.testing.assert_allclose(out, reference(q, k, v, **options), rtol=1e-5, atol=1e-5)
    want = reference_gradients(q, k, v, random(99, q.shape)[0], **options)
    for g, w in zip(grads, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind", "window"),
    [
        ({}, "NO_MASK", 0),
        ({"causal": True}, "CAUSAL", 0),
        ({"causal": True, "window": 100}, "CAUSAL", 100),
    ],
)
@pytest.mark.parametrize("way", ["cudnn", "auto"])
def test_cudnn_is_told_what_is_asked_for(cudnn, way, options, kind, window):
    """Lowered for a GPU, forward and backward: grouped heads, scale, mask and window.

    cuDNN's windows count as ours: of 3, a row sees itself and two before (`jax.nn`).
    """
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    attend = functools.partial(attention, **options, way=way)
    program = jax.jit(functools.partial(gradients, attend)).trace(q, k, k)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(fmha\w+)\((.*?)\) -> ", text)
    assert [name for name, _ in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, call in calls:
        call = call.replace("\\22", "")
        assert f"mask_type: {kind}," in call
        assert f"sliding_window_length: {window}," in call
        assert "fmha_scale: 0.125," in call  # 1 / sqrt(64)
        assert "tensor<2x256x4x64xbf16>, tensor<2x256x2x64xbf16>, tensor<2x256x2x64xbf16>" in call


def test_a_gpu_without_cudnn_goes_by_rows_and_says_so_where_it_may_not(cudnn):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    cudnn(missing)
    (q,) = random(0, (1, 16, 2, 8))
    q = q.astype(jnp.bfloat16)
    np.testing.assert_array_equal(attention(q, q, q), attention(q, q, q, way="rows"))
    with pytest.raises(UserError) as error:
        attention(q, q, q, way="cudnn")
    says = "attention='cudnn' is refused by jax.nn: cuDNN is not detected; use 'rows' or 'auto'"
    assert str(error.value) == says


RING = [
    (dict(sequence=4), 2, {"causal": True}),
    (dict(sequence=4), 2, {}),
    (dict(sequence=2, tensor=2), 2, {"causal": True, "segments": (ids(32), ids(32))}),
    (dict(sequence=4), 2, {"causal": True, "window": 11}),
    (dict(sequence=4), 2, {"causal": True, "softcap": 0.8, "scale": 0.9}),
]


@functools.cache
def ring(case: int, way: str):
    """Compiled gradients of a case of `RING` on a mesh, and its inputs."""
    shape, kv_heads, options = RING[case]
    q, k, v = random(0, (2, 32, 4, 8), *[(2, 32, kv_heads, 8)] * 2)
    attend = functools.partial(attention, **options, tile_rows=8, sequence=way)
    with jax.set_mesh(make_mesh(MeshShape(data=1, **shape))):
        spec = P(None, "sequence", "tensor" if "tensor" in shape else None, None)
        args = [jax.device_put(np.asarray(x), spec) for x in (*random(99, q.shape), q, k, v)]

        @jax.jit
        def run(d_out, *args):
            out, vjp = jax.vjp(attend, *args)
            return out, vjp(d_out)

        return run.lower(*args).compile(), args, (q, k, v), options


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(RING)))
def test_ring_is_the_definition(case):
    run, args, (q, k, v), options = ring(case, "ring")
    out, grads = run(*args)
    np.testing.assert_allclose(out, reference(q, k, v, **options), rtol=1e-5, atol=1e-5)
    want = gradients(functools.partial(attention, **options), q, k, v)[1]
    for g, w in zip(grads, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_ring_has_the_collectives_that_it_needs_and_none_more():
    """Of 4 devices with 8 tokens each; the rounds are a loop, so a round's stand once."""
    pieces, passed = (2, 4), (2, 8)  # [batch, tokens]: half of a device's, and all
    found = collectives(ring(0, "ring")[0].as_text())
    shape = lambda tokens, heads: ("collective-permute", tuple(sorted((*tokens, heads, 8))))
    assert found == {
        # Into zigzag order two permutations for each of q and the output's cotangent, and back
        # for the output and q's gradient; likewise k, v and their gradients.
        shape(pieces, 4): 2 * 4,
        shape(pieces, 2): 2 * 4,
        # Keys and values in a round; again in the backward pass, with their gradients, which are
        # passed on once more at its end.
        shape(passed, 2): 2 + 4 + 2,
    }


@pytest.mark.slow
def test_causal_ring_is_balanced():
    """No device computes more than its share: two pieces of rows by columns in every round."""
    from pjit_train.attention.ring import _pairs

    def work(axis_size, turn):
        @functools.partial(jax.shard_map, in_specs=P("sequence"), out_specs=P("sequence"))
        def count(x):
            found = _pairs(
                (x, ()), (x, x, ()), "sequence", turn, causal=True, window=None, zigzag=True
            )
            cells = sum(r[0].shape[1] * c[0].shape[1] // (2 if m.causal else 1)
                        for r, c, _, m, _ in found)  # fmt: skip
            return jnp.full((1, 8), cells)

        with jax.set_mesh(make_mesh(MeshShape(data=1, sequence=axis_size))):
            x = jax.device_put(np.zeros((axis_size, 8)), P("sequence"))
            return set(np.asarray(count(x)).ravel().tolist())

    assert work(4, None) == work(4, 1) == work(4, 3) == {32}  # of 8 x 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"way": "splash"}, "runs on tpu and this is cpu"),
        ({"way": "cudnn"}, "runs on gpu and this is cpu"),
        ({"way": "fast"}, "is unknown; use auto, rows, flat, splash or cudnn"),
        ({"tile_rows": 0}, "tile_rows=0"),
        ({"window": 0}, "window=0"),
        ({"softcap": 0.0}, "softcap=0.0; use a number above 0"),
        ({"scale": float("nan")}, "scale=nan; use a number above 0"),
        ({"way": "flat", "softcap": 3.0}, "'flat' does not cap logits, and has softcap=3.0; use"),
    ],
)
def test_what_cannot_run_is_one_line(options, says):
    (q,) = random(0, (1, 4, 2, 8))
    with pytest.raises(ValueError, match=says) as error:
        attention(q, q, q, **options)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UserError) == ("way" in options)


@pytest.mark.parametrize(
    ("kernel", "changes", "fits"),
    [
        ("splash", {}, True),
        ("splash", {"length": 200}, False),
        ("splash", {"mask": Mask(True, None, None, False)}, False),
        ("splash", {"mask": Mask(False, 4, 0, False)}, False),
        ("cudnn", {}, True),
        ("cudnn", {"dtype": jnp.float32}, False),
        ("cudnn", {"size": 36}, False),
        ("cudnn", {"segments": True}, False),
    ],
)
def test_kernels_are_chosen_only_where_they_fit(cudnn, kernel, changes, fits):
    given = dict(length=256, size=64, dtype=jnp.bfloat16, mask=Mask(True, None, 0, False))
    given |= changes
    q = jax.ShapeDtypeStruct((1, given["length"], 4, given["size"]), given["dtype"])
    segments = (q, q) if changes.get("segments") else None
    reason = attention_kernels.FITS[kernel](q, q, segments, given["mask"])
    assert (reason is None) == fits
