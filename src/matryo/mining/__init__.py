"""Hard negatives: pairs and a model in, a Parquet file of pairs with negatives out. faiss and pyarrow, no torch.

Read `search.py` first (which candidates are kept, and why), then `run.py` (the steps of a run).
"""

from matryo.mining.options import Mining
from matryo.mining.run import Mined, MinedWidth, mine

__all__ = ["Mined", "MinedWidth", "Mining", "mine"]
