"""First stages: how the n best rows of a prefix are found. All of it is composed of faiss' parts.

`flat.py` scans a column of codes in place; `cells.py` packs codes for faiss' 4-bit fast scan, in one cell (flat) or
many (`ivf`); `graph.py` is `hnsw`. What `cells` and `graph` build covers the rows that were there then; `scanner.py`
adds a flat tail for the rows since, and merges it in behind the readers' backs.
"""
