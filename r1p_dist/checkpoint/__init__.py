"""What a run leaves on disk to resume from: updates and memory of finished tasks, and checkpoints."""

from r1p_dist.checkpoint.adapters import TensorFile as TensorFile
from r1p_dist.checkpoint.adapters import load_updates as load_updates
from r1p_dist.checkpoint.adapters import save_memory as save_memory
from r1p_dist.checkpoint.adapters import save_updates as save_updates
from r1p_dist.checkpoint.adapters import write_facts as write_facts
from r1p_dist.checkpoint.checkpoints import Checkpoint as Checkpoint
from r1p_dist.checkpoint.checkpoints import Checkpoints as Checkpoints
from r1p_dist.checkpoint.folders import read_json as read_json
from r1p_dist.checkpoint.training_state import Capture as Capture
from r1p_dist.checkpoint.training_state import restore_values as restore_values
from r1p_dist.checkpoint.training_state import write_stored as write_stored
