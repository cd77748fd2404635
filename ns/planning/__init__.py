"""What an experiment will cost, before it is started: counted from its configuration, and from a short measurement here."""

from ns.planning.cost import PlanRequest, RunPlan, estimate_run, format_plan_remarks
from ns.planning.data_stats import KnownCounts
from ns.planning.dry_run import dry_run

__all__ = ["KnownCounts", "PlanRequest", "RunPlan", "dry_run", "estimate_run", "format_plan_remarks"]
