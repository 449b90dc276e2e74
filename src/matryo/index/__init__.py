"""The embedded index: one folder that holds vectors, documents and metadata, and searches them coarse to fine.

Read `funnel.py` first (how a plan is executed), then `index.py` (the public class), then `catalogue.py` and
`vectors.py` (what lies on the disk and why it survives a crash).
"""

from matryo.index.hits import Hits
from matryo.index.index import Index
from matryo.index.items import Batch
from matryo.index.writer import CheckReport

__all__ = ["Batch", "CheckReport", "Hits", "Index"]
