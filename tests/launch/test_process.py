"""What a command computes in: the cache of compilations."""

from jax._src import compilation_cache

from launch import process


def test_a_compilation_that_a_kill_cut_short_is_written_again(tmp_path):
    """JAX itself lets the half stand for good: it writes an entry once, where it is read."""
    process.prepare()
    cache, _ = compilation_cache.get_file_cache(str(tmp_path))
    (tmp_path / "jit_step-0123-cache").write_bytes(b"wh")
    cache.put("jit_step-0123", b"whole")
    assert cache.get("jit_step-0123") == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["jit_step-0123-cache"]
