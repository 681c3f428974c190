"""Execution traces of many ranks, replayed on a slice with what has failed there."""
