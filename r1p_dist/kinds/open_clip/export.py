"""What the export of a CLIP needs; see r1p_dist.export.part."""

from r1p_dist.config import BackboneConfig
from r1p_dist.export.finished_run import FinishedRun
from r1p_dist.kinds.open_clip.frozen_weights import ClipWeights
from r1p_dist.kinds.open_clip.hf_folder import HfClip
from r1p_dist.kinds.open_clip.open_clip_folder import write_open_clip

WRITERS = {"open_clip": write_open_clip}


def frozen_weights(config: BackboneConfig) -> ClipWeights:
    return ClipWeights(config)


def hf_model(run: FinishedRun) -> HfClip:
    return HfClip(run)
