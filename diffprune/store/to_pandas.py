"""From Arrow to pandas: the rows of a table as a frame, and the origin of a part, which all its rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diffprune.store.columns import ORIGIN, columns
from diffprune.store.manifest import COMPACTED, Part
from diffprune.store.parts import decode, dictionaries, read_schema


def frame(table: str, parts: list[pa.Table], names: Sequence[str], coded: bool) -> pd.DataFrame:
    """The rows of `parts` (emptied on the way, so that they are not held twice): float NaN stays NaN; whole numbers stay whole, as
    `Int64` only where a value may be missing; dictionaries become categories in the order of their texts.

    coded: as in `read_schema`.
    """
    expected = read_schema(table, coded)
    whole = pa.concat_tables(parts) if parts else pa.schema([expected.field(name) for name in names]).empty_table()
    parts.clear()
    whole = whole.unify_dictionaries()
    whole_numbers = [c for c in columns(table) if c.name in names and c.type is int]
    sure = [c.name for c in whole_numbers if not c.optional and not whole[c.name].null_count]
    found = whole.to_pandas(
        types_mapper={pa.int64(): pd.Int64Dtype()}.get, ignore_metadata=True, split_blocks=True, self_destruct=True
    )
    del whole
    found = found.astype({name: "int64" for name in sure})
    for name in set(dictionaries(table, coded)).intersection(names):
        found[name] = _sorted(found[name])
    return found


def _sorted(column: pd.Series) -> pd.Series:
    """Categories in the order of their texts instead of that of their first rows, without those that no row has."""
    texts = pa.array(column.cat.categories, pa.string())
    order = pc.array_sort_indices(texts)
    used = np.zeros(len(texts) + 1, bool)  # the last one is for what is missing, code -1
    used[column.cat.codes] = True
    order = order.filter(pa.array(used[order.to_numpy()]))
    place = np.full(len(texts) + 1, -1)
    place[order.to_numpy()] = np.arange(len(order))
    categories = pd.Index(texts.take(order).to_pandas(), dtype="str")
    coded = pd.Categorical.from_codes(place[column.cat.codes], categories, validate=False)
    return pd.Series(coded, column.index, name=column.name)


def origins(part: Part, data: bytes) -> list[dict[str, Any]]:
    """Whose rows a part has and who made them, values by the names of `ORIGIN`: one entry, of a compacted part one for each cell.

    Raises:
        Damaged: the part cannot be used.
    """
    names = told(part.table)
    if part.name.startswith(f"{COMPACTED}-"):
        rows = decode(part.table, data, names)
        cell = rows["cell"].to_numpy()
        rows = rows.take(np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]]))
    else:
        rows = decode(part.table, data, names, first=True)
    return listed(rows)


def told(table: str) -> list[str]:
    """The columns of a table that tell an origin, in the order of `ORIGIN`."""
    return [column.name for column in columns(table) if column.owner != "record"]


def listed(rows: pa.Table) -> list[dict[str, Any]]:
    """The origin that each row of the columns `told` tells."""
    return [dict(zip(ORIGIN, row.values(), strict=True)) for row in rows.to_pylist()]


def origin_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row each; objects, so that a missing value stays None beside numbers."""
    return pd.DataFrame([[row[name] for name in ORIGIN] for row in rows], columns=list(ORIGIN), dtype=object)
