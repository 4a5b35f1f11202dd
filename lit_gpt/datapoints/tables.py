"""What a run saw, as a Parquet table to publish: a row for each part of a document in a step.

Columns: step, rank, row (of the step, over all ranks), document (its id), start and length (its tokens in this row).
Costs: replays the run; memory for PARTS parts.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lit_gpt.cli import BadInput
from lit_gpt.datapoints.query import Replay, Seen
from lit_gpt.files import publishing, sweep

COLUMNS = ("step", "rank", "row", "document", "start", "length")
PARTS = 1 << 18
"""Parts of documents in a row group."""


def write_documents(replay: Replay, path: Path, last_step: int | None = None) -> int:
    """Publish the table of the run's history, up to `last_step` if given; returns the last step that is in it.

    Raises BadInput if `path` cannot be written, or if the data is not what the run read.
    """
    schema = pa.schema([(name, pa.string() if name == "document" else pa.int64()) for name in COLUMNS])
    held: list[Seen] = []
    last = 0
    sweep(path.parent, path.name)
    try:
        with publishing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
            for record in replay.record.steps():
                if last_step is not None and record.step > last_step:
                    break
                last = record.step
                held += replay.seen_in(record)
                if len(held) >= PARTS:
                    writer.write_table(_as_table(held, schema))
                    held.clear()
            writer.write_table(_as_table(held, schema))
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error}") from None
    return last


def _as_table(parts: list[Seen], schema: pa.Schema) -> pa.Table:
    return pa.table({name: [getattr(seen, name) for seen in parts] for name in COLUMNS}, schema=schema)
