"""The demo: the whole path on bundled Debian package descriptions, from pairs to answers."""

from matryo.demo.run import DATA, demo

__all__ = ["DATA", "demo"]
