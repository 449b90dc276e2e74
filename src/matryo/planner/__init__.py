"""Planning: the cheapest way to search one's own vectors that reaches a recall, measured on a sample of them."""

from matryo.planner.plan import plan
from matryo.planner.plans import Plans, Rejected, Row

__all__ = ["Plans", "Rejected", "Row", "plan"]
