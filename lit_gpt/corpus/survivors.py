"""The documents that reached the end of a pass: where each came from, its id, and what was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lit_gpt.corpus.parts import Layout
from lit_gpt.files import publishing

KIND = "survivors.arrow"
NOT_MEASURED = 0xFFFFFFFF


class Survivors(NamedTuple):
    places: npt.NDArray[np.int64]
    """File and line, as in Draft.place; rising."""
    ids: pa.ChunkedArray
    ratios: npt.NDArray[np.uint32]
    """Tokens for each word in units of ratio.UNIT, or NOT_MEASURED."""

    @staticmethod
    def read(layout: Layout, number: int, part: int) -> Survivors:
        with pa.memory_map(str(layout.of_pass(number, KIND, part))) as file:
            table = pa.ipc.open_file(file).read_all()
        return Survivors(table["place"].to_numpy(), table["id"], table["ratio"].to_numpy())


def write_survivors(path: Path, places: list[int], ids: list[str], ratios: list[int]) -> None:
    columns: list[Any] = [pa.array(places, pa.int64()), pa.array(ids, pa.string()), pa.array(ratios, pa.uint32())]
    table = pa.table(columns, ["place", "id", "ratio"])
    with publishing(path) as partial, pa.ipc.new_file(str(partial), table.schema) as file:
        file.write_table(table)
