"""What parameters say they are, and what follows from it."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from pjit_train.errors import UserError
from pjit_train.models import blocks
from pjit_train.models.projection import Dense
from pjit_train.models.roles import Role, contraction, param_roles
from pjit_train.models.transformer import TransformerConfig
from pjit_train.models.vit import ViTConfig
from pjit_train.sharding import Rules

CONFIG = TransformerConfig(
    vocab_size=32, max_len=8, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=20
)
LEARNED = dataclasses.replace(
    CONFIG, positions="learned", norm="layernorm", activation="gelu", use_bias=True, tie_head=True
)
VIT = ViTConfig(
    image_size=8, patch_size=4, num_classes=3, d_model=12, num_layers=2, num_heads=4, d_ff=20
)


def shapes(config):
    state = nnx.eval_shape(lambda: config.build(jax.random.key(0), Rules()))
    flat = nnx.to_flat_state(nnx.state(state, nnx.Param))
    return {"/".join(map(str, path)): param.shape for path, param in flat}


@pytest.mark.parametrize("config", [CONFIG, LEARNED, VIT], ids=["llama", "learned", "vit"])
def test_every_parameter_has_a_role_and_kernels_are_the_matrices_of_their_matmuls(config):
    roles, of_shape = param_roles(config), shapes(config)
    assert roles.keys() == of_shape.keys()
    layers = config.num_layers
    for name, role in roles.items():
        assert role.stacked == (of_shape[name][0] == layers and name.startswith("blocks/"))
        if role.matmul:
            assert math.prod(role.matrix_shape(of_shape[name])) == math.prod(of_shape[name])
    D, F, H, d = config.d_model, config.d_ff, config.num_heads, config.head_dim
    want = {"attention/query": (D, H * d), "attention/out": (H * d, D)}
    want |= {"feed_forward/up": (D, F), "feed_forward/down": (F, D)}
    for layer, matrix in want.items():
        name = f"blocks/{layer}/kernel"
        assert roles[name].matrix_shape(of_shape[name]) == (layers, *matrix)


def test_heads_and_tables():
    roles = param_roles(CONFIG)
    assert roles["head"].matmul
    assert roles["head"].matrix_shape((16, 32)) == (1, 16, 32)
    assert not roles["embedding"].matmul  # a lookup
    tied = param_roles(LEARNED)
    assert tied["embedding"].matmul
    assert tied["embedding"].matrix_shape((32, 16))[:2] == (32, 16)  # its transpose is the head
    assert "head" not in tied
    assert not tied["position_embedding"].matmul
    vit = param_roles(VIT)
    assert vit["patches/kernel"].matrix_shape((4, 4, 3, 12)) == (1, 48, 12)
    assert vit["head/kernel"].matrix_shape((12, 3)) == (1, 12, 3)


def test_weight_decay_is_for_all_but_norms_and_biases():
    for name, role in param_roles(LEARNED).items():
        assert role.decays == (name.rsplit("/", 1)[-1] not in ("scale", "bias")), name


def test_what_reads_a_norm_and_what_attention_reads():
    roles = param_roles(CONFIG)
    reads = {name: role.norm for name, role in roles.items() if role.norm is not None}
    assert reads == {
        **{f"blocks/attention/{n}/kernel": "attention_norm" for n in ("query", "key", "value")},
        **{f"blocks/feed_forward/{n}/kernel": "feed_forward_norm" for n in ("up", "gate")},
    }
    attends = {name for name, role in roles.items() if role.attends}
    assert attends == {f"blocks/attention/{n}/kernel" for n in ("query", "key", "value")}


def test_sums_of_the_einsum_are_the_inputs_of_the_role():
    """By what the einsum does: an output changes with all of its inputs, and with no other."""
    block = CONFIG.build(jax.random.key(0), Rules()).blocks
    for path, dense in nnx.iter_modules(block):
        if not isinstance(dense, Dense):
            continue
        role, kernel = dense.kernel.get_metadata("role"), dense.kernel.get_value()[0]
        count = len(role.inputs)
        x = np.zeros((1, 1, *kernel.shape[:count]), np.float32)
        x[(0, 0, *[0] * count)] = 1
        y = np.einsum(dense.equation, x, np.asarray(kernel))
        np.testing.assert_array_equal(y[0, 0], kernel[(0,) * count], err_msg="/".join(path))


class Mine(nnx.Module):
    """A layer of somebody's own, with a parameter that nothing is said of."""

    def __init__(self, config, init):
        self.norm = blocks.Norm(config, init)
        self.mixing = nnx.Param(jax.numpy.ones((4, 4)))


@dataclasses.dataclass(frozen=True)
class MineConfig:
    said: Role | None = None

    def build(self, key, rules):
        from pjit_train.models.parameters import Initializer

        made = Mine(CONFIG, Initializer(key, rules, "float32"))
        if self.said is not None:
            made.mixing = nnx.Param(jax.numpy.ones((4, 4)), role=self.said)
        return made


def test_a_parameter_without_a_role_is_named():
    with pytest.raises(
        UserError, match=r"the parameter mixing has no role; make it by .*role=Role"
    ):
        param_roles(MineConfig())
    role = Role(kind="kernel", inputs=(-1,), matmul=True)
    roles = param_roles(MineConfig(role))
    assert roles["mixing"] == role
    assert contraction(roles)("mixing", (4, 4)) == (-1,)
    assert contraction(roles)("norm/scale", (4,)) is None


def test_what_no_matmul_reads_has_no_matrix():
    with pytest.raises(ValueError, match="of kind norm is of no matmul"):
        Role(kind="norm").matrix_shape((3,))
