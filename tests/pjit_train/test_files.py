"""Files that are whole or as before, whatever goes wrong while they are written."""

import os

import pytest

from pjit_train.errors import UserError
from pjit_train.files import replacing, write_whole


def test_an_error_leaves_the_file_of_before_and_nothing_else(tmp_path):
    path = tmp_path / "figure.png"
    with replacing(path) as new:
        assert new.suffix == ".png"  # by which pictures are written
        new.write_text("first")

    def interrupted():
        with replacing(path) as new:
            new.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["figure.png"]
    assert path.read_text() == "first"


def test_a_text_that_cannot_be_written_is_one_line(tmp_path):
    write_whole(tmp_path / "a", "one\r\n")
    assert (tmp_path / "a").read_bytes() == b"one\r\n"
    with pytest.raises(UserError, match=r"a/b cannot be written: Not a directory"):
        write_whole(tmp_path / "a" / "b", "two")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"c cannot be written: Is a directory"):
        write_whole(tmp_path / "c", "three")
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
