"""Trained runs, pruned and quantized."""
