"""What is found before anything heavy is imported, one line each; all in one start of Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1p_dist.checks import check_run
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from tests.data.toy_task import write_tar

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from r1p_dist.checks import check_run
from r1p_dist.errors import InputError
from r1p_dist.config import RunConfig
for recipe, words, ranks in json.load(sys.stdin):
    try:
        check_run(RunConfig.load(recipe, words), ranks)
        print("fine")
    except InputError as error:
        print(error)
print([name for name in ("torch", "transformers", "open_clip", "deepspeed", "webdataset") if name in sys.modules])
"""


def _stream(folder: Path, **splits: bytes) -> Path:
    """Writes a stream of one task with these bytes as shards; a split without any is a tar file of one sample."""
    folder.mkdir()
    task = {"name": "pets", "class_names": "classes.txt", "templates": "templates.txt"}
    for split in ("train", "validation", "test"):
        shard = folder / f"{split}.tar"
        if split in splits:
            shard.write_bytes(splits[split])
        else:
            write_tar(shard, [("a.cls", b"0"), ("a.png", b"")])
        if splits.get(split) != b"none":
            task[split] = [shard.name]
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "templates.txt").write_text("a {c}\n")
    (folder / "stream.yaml").write_text(yaml.safe_dump({"name": "toy", "tasks": [task]}))
    return folder


def test_all_that_a_run_names_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "clip").mkdir()
    shards = {
        "gzip": (b"\x1f\x8b\x08\x00", "train.tar: is compressed; unpack it with gunzip"),
        "zip": (b"PK\x03\x04", "train.tar: is a zip file; `r1p convert` makes shards"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "train.tar: is a pointer of Git LFS"),
        "page": (b"<!DOCTYPE html>", "train.tar: is a web page"),
        "empty": (b"", "train.tar: empty shard"),
        "ended": (bytes(1024), "train.tar: empty shard"),
        "noise": (bytes(range(256)) * 4, "train.tar: is no tar file: "),
        "short": (b"\x01\x02", "train.tar: is no tar file: "),
    }
    cases = [
        ([f"stream={_stream(tmp_path / name, train=content)}"], 1, message)
        for name, (content, message) in shards.items()
    ]
    good = _stream(tmp_path / "good")
    unseen = _stream(tmp_path / "unseen", validation=b"none")
    cases += [
        ([f"stream={good}"], 1, "fine"),
        ([f"stream={unseen}"], 1, "fine"),
        ([f"stream={unseen}", "data.evaluate_on=validation"], 1, "task pets: has no validation split"),
        (["method=dca"], 1, "method=dca: no such method; did you mean dac?"),
        (["stream=mini_mtli"], 1, "stream=mini_mtli: no such stream file"),
        (["tasks=[fashoin]"], 1, "unknown task 'fashoin' (nearest: fashion)"),
        (["train.per_task.fashoin.lr=1e-3"], 1, "train.per_task: unknown task 'fashoin'"),
        (["stream=mini_instruct"], 1, "is of conversations, which need backbone.kind=llava, got open_clip"),
        (["data.reference=nowhere", "data.reference_share=0.1"], 1, "stream=nowhere: no such stream file"),
        ([], 32, "fine"),
        ([], 3, "train.global_batch_size=32 does not divide into 3 ranks"),
        (["backbone.name=ViT-B-61"], 1, "backbone.name=ViT-B-61: open_clip has no such model; nearest: ViT-B-16"),
        (["backbone.name=ViT-B-16-quickgelu", "backbone.pretrained=openai"], 1, "fine"),
        (["backbone.name=ViT-B-16", "backbone.pretrained=nowhere.safetensors"], 1, "nowhere.safetensors: no such file"),
        ([f"backbone.name=local-dir:{tmp_path}/clip"], 1, "no folder with an open_clip_config.json"),
        (["backbone.kind=llava", "stream=mini_instruct"], 1, "fine"),
        (["backbone.kind=llava", "stream=mini_instruct", "backbone.name=llava-1.5-70b"], 1, "no folder of a model"),
        ([f"run_dir={tmp_path}/file/run"], 1, "file is a file; name another run_dir"),
        ([f"run_dir={tmp_path}/new/run"], 1, "fine"),
    ]
    given = json.dumps([("mini_mtil_dac", words, ranks) for words, ranks, _ in cases])
    result = subprocess.run([sys.executable, "-c", SCRIPT], input=given, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    *lines, heavy = result.stdout.splitlines()
    assert heavy == "[]", "these take seconds"
    for line, (words, _, expected) in zip(lines, cases, strict=True):
        assert expected in line, words
    assert not (tmp_path / "new").exists(), "a check writes nothing"


def test_a_disk_without_room_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import r1p_dist.checks as checks

    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage._replace(free=99 << 20))
    with pytest.raises(InputError, match=r"only 99 MB are free in .*; make room"):
        check_run(RunConfig.load("mini_mtil_dac", [f"run_dir={tmp_path}/run"]))
