"""The memory planner: what a model takes of a card, and which settings of the engine make the best of the rest.

``plan(model, card, gpus)`` decides; the rest counts. Nothing here needs a GPU, or the engine.
"""

from inference.planner.cards import Card, card, known
from inference.planner.choice import plan
from inference.planner.outcome import GOALS, Plan, Wishes

__all__ = ["GOALS", "Card", "Plan", "Wishes", "card", "known", "plan"]
