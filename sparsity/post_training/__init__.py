"""Pruning and quantizing what is trained."""
