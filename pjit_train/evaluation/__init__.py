"""Evaluation of language models by the protocols of the field: perplexity, and tasks by scores."""
