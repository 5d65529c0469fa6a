"""Where runs execute: processes of this machine, or a Ray cluster. Every run directory ends in the same state."""

from holdtrue.engines.cluster import RayEngine
from holdtrue.engines.local import LocalEngine
from holdtrue.engines.port import Engine, Job, Outcome, Status, Told

__all__ = ["Engine", "Job", "LocalEngine", "Outcome", "RayEngine", "Status", "Told"]
