"""What a method is, and what it may ask of the training: see docs/add_a_method.md."""

from r1p_dist.protocol.boundary import BoundaryPlan as BoundaryPlan
from r1p_dist.protocol.boundary import InputPlan as InputPlan
from r1p_dist.protocol.boundary import MomentPlan as MomentPlan
from r1p_dist.protocol.distilled import DistilledMethod as DistilledMethod
from r1p_dist.protocol.distilled import DistilledOptions as DistilledOptions
from r1p_dist.protocol.drift import Drift as Drift
from r1p_dist.protocol.drift import change_between as change_between
from r1p_dist.protocol.full import FullMethod as FullMethod
from r1p_dist.protocol.low_rank import LowRankMethod as LowRankMethod
from r1p_dist.protocol.low_rank import LowRankOptions as LowRankOptions
from r1p_dist.protocol.low_rank import SingleTaskMethod as SingleTaskMethod
from r1p_dist.protocol.low_rank import SingleTaskOptions as SingleTaskOptions
from r1p_dist.protocol.low_rank import joint_stage as joint_stage
from r1p_dist.protocol.method import DataRequest as DataRequest
from r1p_dist.protocol.method import Method as Method
from r1p_dist.protocol.method import Stage as Stage
from r1p_dist.protocol.trainer import Trainer as Trainer
from r1p_dist.protocol.trainer import Watcher as Watcher
from r1p_dist.protocol.watchers import FisherDiagonal as FisherDiagonal
from r1p_dist.protocol.watchers import InputMoments as InputMoments
from r1p_dist.protocol.watchers import Sketching as Sketching
