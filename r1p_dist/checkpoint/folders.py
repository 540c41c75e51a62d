"""Checkpoint folders that are whole or not there: written under another name, a manifest of sizes and hashes last."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from r1p_dist.errors import InputError
from r1p_dist.files import sha256_of, sync

MANIFEST = "manifest.json"
_SPARE_BYTES = 16 << 20  # for everything else that a run writes


def write_folder(folder: Path, files: Mapping[str, bytes], links: Mapping[str, Path]) -> None:
    """Writes the files and links (or copies) the linked ones, then a manifest; the folder gets its name at the end.

    OSError where that fails, as on a full disk; nothing of the folder remains then.
    """
    needed = sum(map(len, files.values())) + _SPARE_BYTES
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(28, f"needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        entries = {}
        for name, content in files.items():
            _write(partial / name, content)
            entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, source in links.items():
            _link(source, partial / name)
            entries[name] = {"bytes": source.stat().st_size, "sha256": sha256_of(source)}
        _write(partial / MANIFEST, json.dumps({"files": entries}, indent=1).encode())
        sync(partial)
        shutil.rmtree(folder, ignore_errors=True)  # a broken one of the same step
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def fault_of(folder: Path) -> str | None:
    """Returns why a checkpoint folder cannot be used, or None where every file has its size and hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not files:
            return f"{MANIFEST} names no file"
        for name, entry in files.items():
            path = folder / name
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}, outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} has other bytes than were written (sha256)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. InputError: it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the content of a safetensors file. InputError: it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def tensor_file(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Returns the content of a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # other file system, or one without links
        shutil.copyfile(source, target)
        sync(target)
