"""What an experiment will cost, before it is started: counted from its configuration, and from a short measurement here."""

from ns.plan.cost import Asked, Plan, plan, remarks
from ns.plan.dry import dry_run
from ns.plan.look import Counts

__all__ = ["Asked", "Counts", "Plan", "dry_run", "plan", "remarks"]
