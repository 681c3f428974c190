"""The parts of JAX that are used and are no part of its interface, each with what it is for.

`tests/launch/test_internals.py` fails by name where a version of JAX has changed one of them.
"""

import contextlib
from types import FunctionType, SimpleNamespace

from pjit_train.files import replacing


def write_compilations_whole() -> None:
    """Has JAX write an entry of its cache of compilations whole, and in place of an unreadable one.

    JAX writes it where it is read, and once: one that a kill cut short would be compiled anew at
    each start. This is of JAX's inside, so where that is another, nothing changes.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import compilation_cache, lru_cache

        suffix = lru_cache._CACHE_SUFFIX

        class Cache(lru_cache.LRUCache):
            def put(self, key: str, value: bytes) -> None:
                if self.eviction_enabled:  # which keeps more than a file of an entry
                    return super().put(key, value)
                with replacing(self.path / f"{key}{suffix}") as new:
                    new.write_bytes(value)

        if hasattr(compilation_cache, "LRUCache"):
            compilation_cache.LRUCache = Cache  # type: ignore[misc]  # a class in place of JAX's


def every_process_caches() -> None:
    """Lets each process write the compilation cache, not only process 0.

    The key of what is compiled for emulated devices differs from process to process, so that the
    others would compile anew each time.
    """
    from jax._src import compiler

    write = compiler._cache_write
    first = SimpleNamespace(global_state=SimpleNamespace(process_id=0))
    names = {**write.__globals__, "distributed": first}
    compiler._cache_write = FunctionType(write.__code__, names, write.__name__, write.__defaults__)


def gloo_listens_on(address: str) -> None:
    """Has gloo, by which CPU devices of several processes communicate, listen at this address only.

    By itself it takes the address that the machine's name has, for which others may reach it.
    """
    from jax._src.lib import _jax

    make = _jax.make_gloo_tcp_collectives
    _jax.make_gloo_tcp_collectives = lambda distributed_client: make(
        distributed_client=distributed_client, hostname=address
    )
