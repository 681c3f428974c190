"""Compression of trained runs: pruned and quantized."""
