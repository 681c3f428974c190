import dataclasses

import pytest

from sparsity.sparsity_types import Block, Channel, NByM, Unstructured, parse_sparsity_type


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NByM(2, 4)),
        ("nm_2,4", NByM(2, 4, axis=-1)),
        ("16:128", NByM(16, 128)),
        ("block_4,8", Block((4, 8), use_avg_pooling=True)),
        ("channel_0", Channel(0)),
        ("channel_-2", Channel(-2)),
    ],
)
def test_texts(text, expected):
    assert parse_sparsity_type(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "4:2",
        "0:4",
        "2:4:8",
        "nm_2",
        "nm",
        "nm_2:4",
        "block_4",
        "block_0,4",
        "channel",
        "channel_x",
        "unstructured_1",
    ],
)
def test_others_say_what_would_be_right(text):
    with pytest.raises(ValueError, match=r"is unknown; use unstructured, N:M .* block.* channel"):
        parse_sparsity_type(text)


def test_types_are_frozen_and_may_be_keys():
    assert len({NByM(2, 4), NByM(2, 4), Block((1, 2)), Channel(), Unstructured()}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        NByM(2, 4).n = 3
