"""Sampling with a cache against the whole forward pass again for every token."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import GPT2, LLAMA, T, V, make_program, place

from pjit_train.errors import UserError
from pjit_train.sample import Sampler
from pjit_train.sharding import Rules

pytestmark = pytest.mark.usefixtures("quick_compiles")
# Spread far enough that tokens follow one another in no simple cycle.
LOUD = {"init_std": 0.4, "position_init_std": 0.4}
MODELS = {
    "llama": dataclasses.replace(LLAMA, **LOUD),
    "gpt2": dataclasses.replace(GPT2, **LOUD, layers="unroll"),
}
MESH = {"data": 2, "sequence": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class Letters:
    """A token a letter from "A" on; the separator is the last of 56, "x"."""

    vocab_size: int = V
    separator: int = V - 1

    def encode(self, text):
        return np.array([ord(letter) - ord("A") for letter in text], np.uint8)

    def decode(self, ids):
        return "".join(chr(int(i) + ord("A")) for i in ids if i != self.separator)


TOKENIZER = Letters()


@pytest.fixture(scope="module", params=MODELS)
def sampled(request):
    """(program on one device, its parameters, its sampler)."""
    program = make_program(MODELS[request.param])
    params = program.new_state()["params"]
    return program, params, Sampler(program.run.model, Rules(), TOKENIZER)


def call(sampled, prompts, **options):
    program, params, sampler = sampled
    with jax.set_mesh(program.mesh):
        return sampler(params, prompts, **options)


def test_greedy_tokens_are_those_of_the_whole_forward_pass(sampled):
    program, params, _ = sampled
    forward = jax.jit(lambda params, tokens: nnx.merge(program.graph, params)(tokens))

    def slow(prompt, tokens):
        ids = [TOKENIZER.separator, *TOKENIZER.encode(prompt)]
        for _ in range(tokens):
            row = np.zeros((1, T), np.int32)  # what follows is not seen
            row[0, : len(ids)] = ids
            with jax.set_mesh(program.mesh):
                logits = np.asarray(forward(params, row))[0, len(ids) - 1]
            ids.append(int(np.argmax(logits)))
            if ids[-1] == TOKENIZER.separator:
                break
        return TOKENIZER.decode(ids)

    prompts = ["", "HELLO"]
    tokens = T - 1 - len("HELLO")  # up to the model's longest sequence
    want = [slow(prompt, tokens) for prompt in prompts]
    assert call(sampled, prompts, tokens=tokens, temperature=0) == want
    assert len(set("".join(want))) > 10  # they do not stand still


@pytest.mark.parametrize("sampled", ["llama"], indirect=True)
def test_the_likeliest_token_alone_is_greedy(sampled):
    greedy = call(sampled, ["AB"], tokens=9, temperature=0)
    assert call(sampled, ["AB"], tokens=9, temperature=1.7, top_k=1, seed=3) == greedy
    for limit in (1e-40, 1.2e-38, 1e-30):
        assert call(sampled, ["AB"], tokens=9, temperature=limit, seed=3) == greedy
    hot = [call(sampled, ["AB"], tokens=9, temperature=1.7, seed=s)[0] for s in range(4)]
    assert len(set(hot)) == 4
    assert call(sampled, ["AB"], tokens=9, temperature=1.7, seed=2) == [hot[2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("gpt2", {"temperature": 0}), ("llama", {"temperature": 1.0, "top_k": 5, "seed": 1})],
)
def test_a_mesh_samples_the_same_text_as_one_device(name, options):
    one, many = make_program(MODELS[name]), make_program(MODELS[name], MESH)
    params = jax.device_get(one.new_state()["params"])
    one_text, many_text = (
        call(
            (p, place(p, params), Sampler(p.run.model, p.run.rules, TOKENIZER)),
            ["AB"],
            tokens=12,
            **options,
        )
        for p in (one, many)
    )
    assert one_text == many_text
    assert len(one_text[0]) > 4


SMALL = dataclasses.replace(LLAMA, d_model=8, d_ff=8, num_layers=1)


def shares(logits, **options):
    """How often each token is drawn from a model with these logits whatever it has seen."""
    program = make_program(SMALL)
    params = jax.tree.map(np.zeros_like, jax.device_get(program.new_state()["params"]))
    params["embedding"][:] = 1.0  # to which the block adds nothing
    params["norm"]["scale"][:] = 1.0
    params["head"][0, :] = logits
    sampler, texts = Sampler(SMALL, Rules(), TOKENIZER), []
    for seed in range(20):
        texts += call((program, params, sampler), [""], tokens=T - 1, seed=seed, **options)
    drawn = np.bincount([ord(letter) - ord("A") for letter in "".join(texts)], minlength=V)
    assert drawn.sum() == 20 * (T - 1)
    return drawn / drawn.sum()


def test_tokens_are_drawn_by_softmax_temperature_and_top_k():
    logits = np.full(V, -20.0, np.float32)
    logits[[3, 7, 11]] = np.log([0.6, 0.3, 0.1])
    for options, want in [
        ({}, [0.6, 0.3, 0.1]),
        ({"temperature": 0.5}, np.array([0.36, 0.09, 0.01]) / 0.46),
        ({"top_k": 2}, np.array([0.6, 0.3, 0.0]) / 0.9),
    ]:
        share = shares(logits, **options)
        assert share[[3, 7, 11]].sum() == pytest.approx(1)
        np.testing.assert_allclose(share[[3, 7, 11]], want, atol=0.1)  # 4 sigma
        assert np.all((share[[3, 7, 11]] > 0) == (np.array(want) > 0))


def test_text_ends_at_the_separator(sampled):
    """The model goes on for as long as the others in its batch; its text does not."""
    tokens = T - 2
    (whole,) = call(sampled, ["A"], tokens=tokens, temperature=0)
    end = whole[8]
    program, params, _ = sampled
    ending = dataclasses.replace(TOKENIZER, separator=ord(end) - ord("A"))
    sampler = Sampler(program.run.model, Rules(), ending)
    # Not at its first place in the text, where the prompt began with another separator.
    (text,) = call((program, params, sampler), ["A"], tokens=tokens, temperature=0)
    assert end not in text
    assert len(text) < len(whole) + 1


def test_a_vocabulary_larger_than_the_tokenizers_samples_none_of_the_rest():
    few = Letters(vocab_size=10, separator=9)
    program = make_program(MODELS["llama"])
    sampler = Sampler(program.run.model, Rules(), few)
    texts = call(
        (program, program.new_state()["params"], sampler), [""] * 5, tokens=20, temperature=3.0
    )
    assert set("".join(texts)) <= set("ABCDEFGHI")
    assert "".join(texts)


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (
            ["A" * 20],
            {"tokens": 4},
            "sample: a prompt of 21 tokens and 4 more exceed the model's max_len=24; "
            "ask for at most so many together",
        ),
        (
            ["A"],
            {"tokens": 0},
            "sample: tokens=0; use a whole number from 1 to 2147483647",
        ),
        (
            ["A"],
            {"tokens": 4, "temperature": float("nan")},
            "sample: temperature=nan; use a number from 0 to 3.4e38",
        ),
        (
            ["A"],
            {"tokens": 4, "top_k": 0},
            "sample: top_k=0; use a whole number from 1 to 2147483647 or None",
        ),
    ],
)
def test_what_cannot_be_sampled_is_one_line(prompts, options, says):
    sampler = Sampler(LLAMA, Rules(), TOKENIZER)
    with pytest.raises(UserError) as error:
        sampler(None, prompts, **options)
    assert str(error.value) == says


def test_no_prompts_give_no_texts():
    assert Sampler(LLAMA, Rules(), TOKENIZER)(None, [], tokens=3) == []
