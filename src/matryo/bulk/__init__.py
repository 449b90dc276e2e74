"""Encoding a corpus that fits in no memory: Parquet in, Parquet out, every row exactly once, on one machine or many.

Read `parts.py` first (how the input is cut, and what a part's file is called), then `encode.py` (one part), `job.py`
(what lies in the folder and how it is checked) and `run.py`. Ray is only known to `cluster.py`.
"""

from matryo.bulk.cluster import Ray
from matryo.bulk.job import check
from matryo.bulk.options import Bulk
from matryo.bulk.run import Progress, embed

__all__ = ["Bulk", "Progress", "Ray", "check", "embed"]
