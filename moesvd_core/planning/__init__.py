"""Statistics + recipe + ratio -> plan. Pure functions over numpy; no torch, no model, milliseconds."""

from moesvd_core.planning.curves import COUPLED, DENSE, SIDES, Side, SideCurve, Structure
from moesvd_core.planning.loss_law import LossLaw
from moesvd_core.planning.planner import layer_plans, max_ratio, plan, plans
from moesvd_core.planning.ranks import Ranks
from moesvd_core.planning.recipe import Allocation, Budget, Metric, Recipe
from moesvd_core.planning.result import LayerPlan, ModelShape, Plan, SidePlan

__all__ = [
    "COUPLED", "DENSE", "SIDES", "Allocation", "Budget", "LayerPlan", "LossLaw", "Metric", "ModelShape", "Plan", "Ranks", "Recipe",
    "Side", "SideCurve", "SidePlan", "Structure", "layer_plans", "max_ratio", "plan", "plans",
]
