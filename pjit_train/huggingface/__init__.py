"""Weights, configurations and tokenizers from and to Hugging Face folders."""
