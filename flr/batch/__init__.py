"""Everybody's lists, offline: histories in Parquet, in shards, on processes of this machine or on Ray.

How a run is described: settings, inputs, plan. How a shard is computed: queries, worker. How shards are handed out:
processes, on_ray, run. Files are read and written through storage, wherever fsspec reaches.
"""

from .run import Progress, Summary, write_lists
from .settings import BatchSettings

__all__ = ["BatchSettings", "Progress", "Summary", "write_lists"]
