"""Where a run is shown beside its own folder: one small file for each service, by name in `log.trackers`."""

from r1p_dist.trackers.tracker import TrackedRun, Tracker
from r1p_dist.trackers.trackers import Trackers, check_trackers

__all__ = ["TrackedRun", "Tracker", "Trackers", "check_trackers"]
