"""Indexes in databases that run already: the verbs of `matryo.Index`, each engine doing its own funnel natively.

`base.py` holds what all of them share: input checked before anything is sent, calibration, retries. `address.py` reads
URLs and credentials. One module per engine says how a plan, a filter and a batch are put in its own words, and what it
cannot do, as data (`Can`).
"""
