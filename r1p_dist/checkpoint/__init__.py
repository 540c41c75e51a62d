"""What a run leaves on disk to go on from: adapters of finished tasks, and checkpoints."""

from r1p_dist.checkpoint.adapters import load_adapter as load_adapter
from r1p_dist.checkpoint.adapters import save_adapter as save_adapter
from r1p_dist.checkpoint.checkpoints import Checkpoint as Checkpoint
from r1p_dist.checkpoint.checkpoints import Checkpoints as Checkpoints
from r1p_dist.checkpoint.folders import read_json as read_json
from r1p_dist.checkpoint.training_state import Capture as Capture
from r1p_dist.checkpoint.training_state import restore_values as restore_values
