"""Features of pictures in a folder that ranks and runs share: each in a file that is whole or not there.

A folder holds one sub-folder per way to make features: its name is a hash of the image tower's weights, of how pictures
are prepared and of what computes. So nothing in it can be of another tower, and nothing is ever written over.
"""

import hashlib
import json
import logging
import uuid
import zlib
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn
from transformers import ProcessorMixin

from r1p_dist.backbones.weights import Placement
from r1p_dist.errors import InputError, one_line
from r1p_dist.files import lock_file

_LIBRARIES = ("torch", "torchvision", "transformers", "pillow", "numpy")
_COUNT_FILE = ".bytes"  # of each sub-folder, so that removing one makes room
_CHECK_BYTES = 4  # the CRC-32 of what follows
_logger = logging.getLogger(__name__)


def tower_fingerprint(tower: nn.Module, processor: ProcessorMixin, facts: dict, placement: Placement) -> str:
    """Returns a hash of what decides an image tower's features, beside the picture: 32 hexadecimal digits.

    Its weights as they come from their files, before they are placed; the image processor's class and settings; the
    libraries' versions; the precision and kind of device that it runs in; and facts, JSON.
    """
    digest = hashlib.sha256()
    for name, weight in tower.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {weight.is_meta}\n".encode())
        if not weight.is_meta:  # else random, a function of name and shape
            digest.update(weight.detach().flatten().view(torch.uint8).numpy())
    pictures = processor.image_processor
    settings = {
        "processor": [type(pictures).__name__, pictures.to_dict()],
        "facts": facts,
        "libraries": {library: version(library) for library in _LIBRARIES},
        "precision": str(placement.dtype),
        "device": placement.device.type,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


class FeatureFiles:
    """The features that one tower made, by the names of pictures.

    limit_bytes: of the whole folder with all towers in it, None: no limit. When it is reached, or the disk is full,
    nothing more is written; nothing is removed. InputError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: str, limit_bytes: int | None):
        self.folder, self.limit_bytes = folder / fingerprint, limit_bytes
        self._lock, self._is_full = folder / ".lock", False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock_file(self._lock):
                pass
        except OSError as error:
            raise InputError(
                f"backbone.feature_cache_dir={folder}: cannot be written to: {one_line(error)}; name a folder of yours"
            ) from error

    def read(self, name: str) -> torch.Tensor | None:
        """Returns the features of a picture; None where there are none, or their file is damaged."""
        try:
            content = self._path(name).read_bytes()
        except OSError:
            return None
        check, content = content[:_CHECK_BYTES], content[_CHECK_BYTES:]
        if check != _check_of(content):
            return None
        return load(content)["features"]

    def write(self, name: str, features: torch.Tensor) -> None:
        """Writes the features of a picture, on the CPU, where there is room. Another process may do the same."""
        path = self._path(name)
        content = save({"features": features.contiguous()})
        try:
            if self._is_full or not self._reserve(path, len(content) + _CHECK_BYTES):
                return
            path.parent.mkdir(exist_ok=True)
            # not synced: what a power cut leaves is told by its check, and computed again
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                temporary.write_bytes(_check_of(content) + content)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._is_full = True
            _logger.warning("%s: %s; no more features are kept there", self.folder, one_line(error))

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _reserve(self, path: Path, size: int) -> bool:
        """Counts a file's bytes before they are written, so that all writers together keep to the limit.

        A process that dies in between leaves too many counted, never too few.
        """
        with lock_file(self._lock):
            if path.is_file():  # it was damaged, and its bytes are counted
                return True
            used = sum(map(_counted, self._lock.parent.glob(f"*/{_COUNT_FILE}")))
            if self.limit_bytes is not None and used + size > self.limit_bytes:
                self._is_full = True
                _logger.info("%s: backbone.feature_cache_dir_gb is reached", self._lock.parent)
                return False
            own = self.folder / _COUNT_FILE
            own.write_text(str(_counted(own) + size), encoding="utf-8")
            return True


def _check_of(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECK_BYTES, "little")


def _counted(file: Path) -> int:
    return int(file.read_text(encoding="utf-8") or 0) if file.is_file() else 0
