"""Exact attention by several implementations; `attention` takes the best one for its input."""

from pjit_train.attention.dispatch import attention

__all__ = ["attention"]
