"""Arrays in files: every block is checked before a value of it is read, and only then."""

import numpy as np
import pytest

from pjit_train.data.checked import BLOCK_BYTES, CheckedArray, Writer
from pjit_train.errors import UserError


def written(path, values, part=70_001):
    data = values.tobytes()
    with Writer(path) as file:
        for start in range(0, len(data), part):
            file.write(data[start : start + part])
    return CheckedArray(path, values.dtype)


def flip(path, byte):
    data = bytearray(path.read_bytes())
    data[byte] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("length", [1, BLOCK_BYTES // 2, BLOCK_BYTES // 2 + 1, 5 * BLOCK_BYTES])
@pytest.mark.parametrize("part", [1 << 30, 70_001, BLOCK_BYTES])
def test_reads_what_was_written_in_any_parts(tmp_path, length, part):
    values = np.random.default_rng(0).integers(0, 1 << 16, length).astype(np.uint16)
    array = written(tmp_path / "a", values, part)
    assert len(array) == length
    assert array.dtype == np.uint16
    for start, stop in [(0, length), (3, 40), (length - 1, length + 9), (-5, None), (9, 3)]:
        np.testing.assert_array_equal(array[start:stop], values[start:stop])


def test_a_flipped_bit_is_found_by_whoever_reads_its_block_and_by_nobody_else(tmp_path):
    values = np.arange(3 * BLOCK_BYTES // 4, dtype=np.int32)  # three blocks
    written(tmp_path / "a", values)
    flip(tmp_path / "a", BLOCK_BYTES + 7)
    array = CheckedArray(tmp_path / "a", np.int32)
    block = BLOCK_BYTES // 4
    np.testing.assert_array_equal(array[:block], values[:block])
    np.testing.assert_array_equal(array[2 * block :], values[2 * block :])
    for start, stop in [(block, block + 1), (block - 1, block + 1), (0, None)]:
        with pytest.raises(UserError, match="a is damaged between bytes 65,536 and 131,072"):
            array[start:stop]


def test_a_flipped_checksum_is_damage_too(tmp_path):
    written(tmp_path / "a", np.arange(10))
    flip(tmp_path / "a.crc32", 2)
    with pytest.raises(UserError, match="delete that directory"):
        CheckedArray(tmp_path / "a", np.int64)[3:4]


def test_checksums_of_another_file_are_refused(tmp_path):
    written(tmp_path / "a", np.arange(10))
    written(tmp_path / "b", np.arange(100_000))
    (tmp_path / "b.crc32").rename(tmp_path / "a.crc32")
    with pytest.raises(ValueError, match="not of the size"):
        CheckedArray(tmp_path / "a", np.int64)
