"""The tokens of a run, made before its trainers start: on a cluster by all its processors.

There it is a Ray Data job: one task, on the driver's node, streams the documents in blocks of about
a million characters, tasks on all nodes encode a block each, and the driver writes their ids to the
cache in the order of the documents. One reader is enough, because it is some forty times as fast as
a processor that encodes; and with readers of their own the tasks would wait for each other, since
the order is kept and what is done too early has to be held in memory.
"""

import functools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch.pod import events
from launch.pod.record import Record
from pjit_train.data import cache
from pjit_train.data.conversations import Conversations
from pjit_train.data.data import Data
from pjit_train.data.text import TextData
from pjit_train.errors import TrainingError, UserError

_SAY = 10.0  # seconds between two lines of progress
_RETRIES = 3  # of documents whose task died; for ever by default, and no named parameter has it


def prepare(data: Data, record: Record, *, on_cluster: bool) -> None:
    """Sees to it that the token caches of a run are there, and records what was done for it.

    Data other than text have none.

    Args:
      on_cluster: whether the Ray that this process is connected to is to do it; otherwise this
        process does, which is faster on one machine: a tokenizer uses all its processors.

    Raises:
      UserError: as `TextData.open_caches`.
      TrainingError: a task crashed, again and again.
    """
    if not isinstance(data, TextData):
        return

    def tokenize(source, split: str, tokenizer, cache_dir: Path) -> Iterator[cache.Encoded]:
        began, size, said = time.monotonic(), 0, time.monotonic()
        begun = record.of(events.AttemptBegun)
        attempt = 1 + max((event.attempt for event in begun), default=0)
        what, where = f"the {split} text of {type(source).__name__}", "here"
        encoded = cache.tokenize(source, split, tokenizer, cache_dir)
        texts = not isinstance(source, Conversations)  # whose template writes them, by this process
        if on_cluster and texts and (processors := _processors()) > 1:
            where = f"by {processors} processors of the cluster"
            encoded = tokenize_on_cluster(source, split, tokenizer, cache_dir)
        record(events.Tokenize(attempt=attempt, text=f"tokenizing {what} {where}"))
        try:
            for part in encoded:
                yield part
                size += part.text_bytes
                if time.monotonic() - said > _SAY:
                    said = time.monotonic()
                    text = f"tokenized {size / 1e6:,.0f} MB of {what}"
                    record(events.Tokenizing(attempt=attempt, text=text))
        except Exception as error:
            record(events.TokenizingStopped(attempt=attempt, error=str(error)))
            raise
        seconds = time.monotonic() - began
        text = f"tokenized {what}: {size / 1e6:,.1f} MB in {seconds:.1f} s"
        record(events.Tokenized(attempt=attempt, text=text))

    data.open_caches(tokenize)


def tokenize_on_cluster(source, split: str, tokenizer, cache_dir: Path) -> Iterator[cache.Encoded]:
    """`cache.tokenize`, by a Ray Data job on the Ray that this process is connected to."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = cache.BATCH_CHARACTERS
    read = functools.partial(_read, source, split, cache_dir.absolute(), os.getcwd())
    # A reader takes no processor: it may be the only one, and those who encode wait for it.
    documents = ray.data.read_datasource(_documents(read), num_cpus=0, override_num_blocks=1)
    dtype = cache.id_type(tokenizer.vocab_size)
    encode = functools.partial(_encode, tokenizer, dtype)
    encoded = documents.map_batches(
        encode,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=1,
        max_retries=_RETRIES,
    )
    try:
        for block in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            for mistake in block["mistake"].drop_null():
                raise UserError(mistake.as_py())
            ids = [np.frombuffer(one.as_buffer(), dtype) for one in block["ids"]]
            yield cache.Encoded(ids, sum(block["text_bytes"].to_pylist()))
    except (ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError) as error:
        traceback.print_exc()
        raise TrainingError(
            f"tokenizing the {split} text of {type(source).__name__}: a task failed "
            f"({type(error).__name__}); what it said is in pod/driver.log of the run directory"
        ) from error


def _documents(read: Callable[[], Iterator]):
    """A source of Ray Data that has one task, on the driver's node."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Documents(Datasource):
        supports_distributed_reads = False

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(read, unknown)]

    return Documents()


def _read(source, split: str, cache_dir: Path, cwd: str) -> Iterator[Any]:
    """Yields tables of documents, with a row at the end that says what the user's mistake is.

    A text is in UTF-8 with surrogates, as which Python holds bytes that are none.
    """
    import pyarrow as pa

    os.chdir(cwd)
    schema = pa.schema([("text", pa.large_binary()), ("mistake", pa.string())])
    try:
        for texts in cache.batches(source.documents(split, cache_dir)):
            data = [text.encode("utf-8", "surrogatepass") for text in texts]
            yield pa.table({"text": data, "mistake": [None] * len(data)}, schema)
    except UserError as error:
        yield pa.table({"text": [b""], "mistake": [str(error)]}, schema)


def _encode(tokenizer, dtype: type[np.unsignedinteger], documents) -> Any:
    """The table of the ids of a table of documents, by one thread."""
    import pyarrow as pa

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = [text.decode("utf-8", "surrogatepass") for text in documents["text"].to_pylist()]
    try:
        encoded = [cache.encode([text], tokenizer) for text in texts]
    except UserError as error:
        return pa.table(
            {
                "ids": pa.array([b""], pa.large_binary()),
                "text_bytes": pa.array([0], pa.int64()),
                "mistake": pa.array([str(error)], pa.string()),
            }
        )
    columns = {
        "ids": pa.array([one.ids[0].astype(dtype).tobytes() for one in encoded], pa.large_binary()),
        "text_bytes": pa.array([one.text_bytes for one in encoded], pa.int64()),
        "mistake": documents["mistake"],
    }
    return pa.table(columns)


def _processors() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 0))
