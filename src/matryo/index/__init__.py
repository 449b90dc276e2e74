"""The index: vectors, documents and metadata, searched coarse to fine.

`index.py` says what every index does, wherever it lies. All else here is the embedded engine, one folder: read
`funnel.py` first (how a plan is executed), then `folder.py`, then `catalogue.py` and `vectors.py` (what lies on the
disk and why it survives a crash). Databases are in `matryo.engines`.
"""

from matryo.index.folder import FolderIndex
from matryo.index.hits import Hits
from matryo.index.index import Index
from matryo.index.items import Batch
from matryo.index.report import CheckReport

__all__ = ["Batch", "CheckReport", "FolderIndex", "Hits", "Index"]
