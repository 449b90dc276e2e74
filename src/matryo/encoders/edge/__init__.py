"""Folders for small devices: a model cut to one width, quantised, with a file of Python that runs it.

`small_static.py` and `small_onnx.py` are those files; they are copied as they are, and need nothing of Matryo.
"""

from matryo.encoders.edge.write import export_edge

__all__ = ["export_edge"]
