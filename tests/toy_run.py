"""A stream of few pictures and a CLIP of two or three blocks per tower, for tests that train whole runs many times.

They are cut from what ships with the package, so names, files and formats are those of a real run.
"""

import json
import shutil
import tarfile
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from r1p_dist.data.stream import ASSETS
from tests.data.toy_task import write_tar

# of the small CLIP's towers: with these it still tells pictures apart, so that answers show whether weights are equal
BLOCKS = {"visual.transformer.resblocks.": (0, 1, 5), "transformer.resblocks.": (0, 1)}
CLASSES = 8
PICTURES = {"train": 40, "validation": 16, "test": 12}
TASKS = ("playing_cards", "animal_silhouettes", "country_flags")


def write_toy(folder: Path, blocks: dict[str, tuple[int, ...]] = BLOCKS) -> list[str]:
    """Writes both and returns the overrides of `mini_mtil` that choose them. blocks: which of the towers' are kept."""
    stream = [write_task(folder / "stream" / name, name) for name in TASKS]
    (folder / "stream/stream.yaml").write_text(yaml.safe_dump({"name": "toy", "tasks": stream}))
    write_model(folder / "model", blocks)
    return [f"stream={folder / 'stream'}", f"backbone.name=local-dir:{folder / 'model'}"]


def write_task(folder: Path, name: str) -> dict:
    """Writes the first pictures of a task's first classes, and returns its entry of stream.yaml."""
    source = ASSETS / "mini_mtil" / name
    folder.mkdir(parents=True)
    classes = (source / "classnames.txt").read_text().splitlines()[:CLASSES]
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    shutil.copy(source / "zeroshot_classification_templates.txt", folder)
    entry = {
        "name": name,
        "class_names": f"{name}/classnames.txt",
        "templates": f"{name}/zeroshot_classification_templates.txt",
    }
    for split, count in PICTURES.items():
        with tarfile.open(source / f"{split}-000000.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        keys = [file.removesuffix(".cls") for file, content in files.items() if file.endswith(".cls")]
        keys = [key for key in keys if int(files[f"{key}.cls"]) < CLASSES][:count]
        kept = [(file, content) for file, content in files.items() if file.partition(".")[0] in keys]
        write_tar(folder / f"{split}-000000.tar", kept)
        entry[split] = [f"{name}/{split}-000000.tar"]
        entry["sizes"] = {**entry.get("sizes", {}), split: len(keys)}
    return entry


def write_model(folder: Path, blocks: dict[str, tuple[int, ...]]) -> None:
    """Writes the small CLIP with these blocks of its towers."""
    source = ASSETS / "tiny"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "open_clip_config.json").read_text())
    for tower, kept in zip(("vision_cfg", "text_cfg"), blocks.values(), strict=True):
        config["model_cfg"][tower]["layers"] = len(kept)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = {}
    for name, tensor in load_file(source / "open_clip_model.safetensors").items():
        prefix = next((prefix for prefix in blocks if name.startswith(prefix)), None)
        if prefix is None:
            weights[name] = tensor
        else:
            block, _, rest = name.removeprefix(prefix).partition(".")
            if int(block) in blocks[prefix]:
                weights[f"{prefix}{blocks[prefix].index(int(block))}.{rest}"] = tensor
    save_file(weights, folder / "open_clip_model.safetensors")
