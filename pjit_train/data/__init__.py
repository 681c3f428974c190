"""Text in, batches out: sources, tokenizers, a token cache, and batches by (seed, step).

The way of a text: a source (`sources`) gives documents, a tokenizer (`tokenizers`) turns them into
ids, `cache` keeps those on disk, `packing` cuts them into rows, and `text.TextData` puts it all
together.
"""

from pjit_train.data.conversations import Conversations
from pjit_train.data.sources import PythonStdlib, TextFiles, Tfds
from pjit_train.data.text import Batches, TextData
from pjit_train.data.tokenizers import Bytes, TokenizerJson, train_tokenizer

__all__ = [
    "Batches",
    "Bytes",
    "Conversations",
    "PythonStdlib",
    "TextData",
    "TextFiles",
    "Tfds",
    "TokenizerJson",
    "train_tokenizer",
]
