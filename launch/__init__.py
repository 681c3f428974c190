"""Entry points: the command line, gin, Ray."""

__version__ = "0.1.0"
