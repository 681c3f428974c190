"""The private parts of libraries that are used are still what they are used as."""

import io

import gin
import pytest

from launch import gin_internals


@pytest.fixture(autouse=True)
def gin_as_it_is():
    """Puts back what a test sets."""
    readers, pretty = list(gin.config._FILE_READERS), gin.config.pprint
    yield
    gin.config._FILE_READERS[:], gin.config.pprint = readers, pretty
    gin.clear_config()


def test_gin_opens_files_by_the_reader_that_it_is_given(tmp_path):
    (tmp_path / "a.gin").write_text("ignored")
    gin_internals.read_files_by(lambda path: io.StringIO("A = 3\n"))
    gin.clear_config()
    gin.parse_config_file(str(tmp_path / "a.gin"))
    assert gin.query_parameter("%A") == 3


def test_gin_writes_dictionaries_in_their_order():
    gin_internals.keep_the_order_of_dictionaries()
    gin.clear_config()
    gin.parse_config("A = {'z': 1, 'a': 2}\n")
    assert gin.config_str().strip().splitlines()[-1] == "A = {'z': 1, 'a': 2}"
