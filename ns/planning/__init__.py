"""What an experiment will cost, before it is started: counted from its configuration, and from a short measurement here."""

from ns.planning.cost import Asked, Plan, plan, remarks
from ns.planning.data_stats import Counts
from ns.planning.dry_run import dry_run

__all__ = ["Asked", "Counts", "Plan", "dry_run", "plan", "remarks"]
