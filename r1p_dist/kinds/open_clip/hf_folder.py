"""The merged CLIP as a folder for transformers: CLIPModel, tokenizer and image processor."""

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from PIL.Image import Resampling
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from r1p_dist.export.finished_run import FinishedRun, TaskUpdate
from r1p_dist.export.model_card import write_card
from r1p_dist.export.safetensors_writer import write_tensors
from r1p_dist.files import write_atomically
from r1p_dist.kinds.open_clip.hf import check_is_clip, hf_config, hf_entries, hf_module
from r1p_dist.kinds.open_clip.open_clip_folder import model_config


class HfClip:
    """An HfModel of CLIPModel; weights are in fp32 unless another type is asked for."""

    model_class = "CLIPModel"
    base_name = None  # the hub has open_clip's weights under names of its own

    def __init__(self, run: FinishedRun):
        """InputError: CLIPModel cannot express the model."""
        check_is_clip(run.base.backbone.model)
        self._run = run

    def module(self, layer: str) -> str:
        return hf_module(layer)

    def write(self, folder: Path, tasks: Sequence[TaskUpdate], dtype: torch.dtype | None) -> None:
        run, dtype = self._run, dtype or torch.float32
        tokenizer, preprocess = _tokenizer(run), image_processor(run.base.backbone.preprocess)
        folder.mkdir(exist_ok=True)
        write_tensors(folder / "model.safetensors", hf_entries(run.merged_weights(tasks), dtype))
        hf_config(run.base.backbone.model, tokenizer, dtype).save_pretrained(folder)
        usage = ["from transformers import CLIPModel, CLIPProcessor", "", 'model = CLIPModel.from_pretrained("FOLDER")']
        notes = []
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        else:
            notes.append("No tokenizer of transformers gives open_clip's ids for this model: use open_clip's.")
        if preprocess is not None:
            write_atomically(folder / "preprocessor_config.json", json.dumps(preprocess, indent=2) + "\n")
        else:
            notes.append("No image processor of transformers resizes as open_clip does here: use open_clip's.")
        if tokenizer is not None and preprocess is not None:
            usage.append('processor = CLIPProcessor.from_pretrained("FOLDER")')
            notes.append(
                "The processor's tokens are open_clip's up to padding, for text without HTML entities and broken "
                "Unicode, which open_clip mends first. Its pictures are resized and cropped by other code: up to a "
                "pixel and a few 255ths apart."
            )
        write_card(folder, run, tasks, "transformers", "\n".join(usage), notes)


def _tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of transformers that gives the run's token ids; None where there is none."""
    tokenizer, text_cfg = run.base.backbone.tokenizer, model_config(run.config.backbone)["text_cfg"]
    if text_cfg.get("tokenizer_kwargs") or text_cfg.get("tokenizer_mode"):
        return None  # open_clip cleans texts or edits ids in ways of its own
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.tokenizer
    return clip_tokenizer(tokenizer)


def clip_tokenizer(tokenizer: open_clip.SimpleTokenizer) -> CLIPTokenizer:
    """Returns open_clip's own tokenizer as one of transformers; it pads with the end token, not with 0."""
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): index for token, index in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocabulary, merges, model_max_length=tokenizer.context_length)


def image_processor(preprocess: dict) -> dict | None:
    """Returns open_clip's preprocessing as the configuration of a CLIPImageProcessor; None where it has no such way."""
    height, width = preprocess["size"]
    if preprocess["resize_mode"] not in ("shortest", "squash") or preprocess["interpolation"] not in (
        "bicubic",
        "bilinear",
    ):
        return None
    is_cropped = preprocess["resize_mode"] == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if is_cropped else {"height": height, "width": width},
        "resample": int(Resampling[preprocess["interpolation"].upper()]),
        "do_center_crop": is_cropped,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }
