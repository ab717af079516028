"""The one home of results: Parquet parts published by manifest, one writer per run. `Store`, `lock`; see `parquet.py`."""

from diffprune.io.attempts import Fenced
from diffprune.store.parquet import Store
from diffprune.store.run_lock import Busy, lock

__all__ = ["Busy", "Fenced", "Store", "lock"]
