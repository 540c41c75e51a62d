"""Checkpoint folders: whole or not there, every damage found, nothing in them trusted."""

import json
import os
import random
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load, save

from r1p_dist.checkpoint.checkpoints import Checkpoint, Checkpoints, checkpoint_folders, config_differences
from r1p_dist.checkpoint.folders import fault_of, read_json, tensor_file, write_folder
from r1p_dist.checks import check_run
from r1p_dist.config import RunConfig
from r1p_dist.errors import EXIT_INPUT, InputError, report_errors
from r1p_dist.recipes import load_config

CONTENT = {
    "training.safetensors": save({"image.0.q.A.value": torch.arange(3000.0)}),
    "state.json": b'{"format": 2, "stage": 0, "step": 4}',
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(os.urandom(9000))
    config = load_config("mini_mtil_dac", [f"run_dir={tmp_path}"]).dump().encode()
    folder = tmp_path / "checkpoints/00-fashion/step-4"
    write_folder(folder, CONTENT | {"config.yaml": config}, {"merged-00.safetensors": adapter})
    return folder


def test_a_written_folder_is_whole_and_has_what_was_given(whole: Path) -> None:
    assert fault_of(whole) is None
    assert (whole / "state.json").read_bytes() == CONTENT["state.json"]
    assert (whole / "merged-00.safetensors").stat().st_nlink == 2, "no second copy of the experts"
    entries = json.loads((whole / "manifest.json").read_text())["files"]
    assert sorted(entries) == ["config.yaml", "merged-00.safetensors", "state.json", "training.safetensors"]
    assert [path.name for path in whole.parent.iterdir()] == ["step-4"]


def test_every_cut_at_a_block_and_many_flipped_bits_are_found(whole: Path) -> None:
    generator = random.Random(0)
    shutil.copy(whole / "merged-00.safetensors", whole / "copy")
    (whole / "copy").replace(whole / "merged-00.safetensors")
    for path in sorted(whole.iterdir()):
        content = path.read_bytes()
        for size in range(0, len(content), 4096):
            path.write_bytes(content[:size])
            assert fault_of(whole) is not None, f"{path.name} cut to {size} bytes"
        places = range(len(content)) if len(content) < 1500 else generator.sample(range(len(content)), 300)
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            assert fault_of(whole) is not None, f"{path.name} byte {place}"
        path.unlink()
        assert fault_of(whole) is not None, f"{path.name} missing"
        path.write_bytes(content)
    assert fault_of(whole) is None


def test_a_failed_write_leaves_nothing_and_the_one_before(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for failing in ("r1p_dist.checkpoint.folders.sync", "r1p_dist.checkpoint.folders._link"):
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(failing, fail)
            with pytest.raises(OSError, match="No space left"):
                write_folder(whole.with_name("step-8"), CONTENT, {"a": whole / "state.json"})
        assert [path.name for path in whole.parent.iterdir()] == ["step-4"] and fault_of(whole) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_or_read_only_disk_is_noticed_before_and_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(OSError, match="needs .* MB, .* MB are free"):
            write_folder(disk / "step-2", CONTENT, {})
        assert list(disk.iterdir()) == [], "the free space was looked at first"
        monkeypatch.setattr("r1p_dist.checkpoint.folders._SPARE_BYTES", -(4 << 20))
        with pytest.raises(OSError, match="No space left on device"):
            write_folder(disk / "step-2", {"large": bytes(2 << 20)}, {})
        assert list(disk.iterdir()) == [], "nothing half-written stays"
        write_folder(disk / "step-2", CONTENT, {})
        assert fault_of(disk / "step-2") is None
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert report_errors(lambda: write_folder(disk / "step-3", CONTENT, {}) and 0) == EXIT_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: [Errno 30] Read-only file system") and "mount it for writing" in line
        assert fault_of(disk / "step-2") is None
        with pytest.raises(InputError, match=f"run_dir={disk}: cannot write in .*; name another run_dir"):
            check_run(RunConfig.load("mini_mtil_dac", [f"run_dir={disk}"]))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_files_follow_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "step-1", CONTENT, {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "step-1").iterdir()}
    assert set(modes.values()) == {0o640} and stat.S_IMODE((tmp_path / "step-1").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    "manifest",
    [
        {"files": {"../../secret": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
        {"files": {}},
        {"files": []},
        {"files": {"state.json": 3}},
        {"files": {"state.json": {"bytes": "x"}}},
        [],
        3,
    ],
)
def test_a_hostile_manifest_is_a_fault_and_no_more(whole: Path, manifest: object) -> None:
    (whole / "manifest.json").write_text(json.dumps(manifest))
    assert fault_of(whole)


def test_hostile_tensor_files_and_json_are_clean_errors(tmp_path: Path) -> None:
    good = save({"a": torch.zeros(4)})
    hostile = [
        b"",
        b"\xff" * 8,
        (2**60).to_bytes(8, "little") + good[8:],
        good[:-1],
        good.replace(b'"F32"', b'"XYZ"'),
        good.replace(b"[0,16]", b"[0,99]"),
        b"\x80\x04\x95" + bytes(40),  # the beginning of a pickle
    ]
    for number, content in enumerate(hostile):
        (tmp_path / "training.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="training.safetensors: cannot be read as safetensors") as caught:
            Checkpoint(tmp_path, {}).tensors("training")
        assert "\n" not in str(caught.value), number
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "state.json").write_bytes(content)
        with pytest.raises(InputError, match="state.json: cannot be read as JSON"):
            read_json(tmp_path / "state.json")


def test_a_tensor_file_has_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(3)}
    assert all(torch.equal(load(tensor_file(tensors))[name], tensor) for name, tensor in tensors.items())


def write_steps(root: Path, config: RunConfig, steps: dict[str, int]) -> None:
    for name, step in steps.items():
        state = {"format": 2, "task": "a", "stage": 0, "step": step, "world_size": 1, "log_bytes": {}, "progress": {}}
        state |= {"facts": {}, "cursor": {}, "adam_steps": step}
        content = {"state.json": json.dumps(state).encode(), "config.yaml": config.dump().encode()}
        write_folder(root / name, content, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", -1),
        ("stage", "0"),
        ("step", 1.5),
        ("log_bytes", {"log.jsonl": -5}),
        ("cursor", None),
        ("progress", []),
    ],
)
def test_a_hostile_state_is_one_clean_line(tmp_path: Path, key: str, value: object) -> None:
    config = load_config("mini_mtil_dac", [f"run_dir={tmp_path}"])
    write_steps(tmp_path / "first", config, {"00-a/step-2": 2})
    state = json.loads((tmp_path / "first/00-a/step-2/state.json").read_text())
    state[key] = value
    content = {"state.json": json.dumps(state).encode(), "config.yaml": config.dump().encode()}
    write_folder(tmp_path / "checkpoints/00-a/step-2", content, {})
    with pytest.raises(InputError, match="step-2/state.json: ") as caught:
        Checkpoints(config).find()
    assert "\n" not in str(caught.value)


def test_the_newest_whole_checkpoint_is_found_and_the_others_named(tmp_path: Path, caplog) -> None:
    config = load_config("mini_mtil_dac", [f"run_dir={tmp_path}"])
    root = tmp_path / "checkpoints"
    write_steps(root, config, {"00-a/step-9": 9, "00-a/step-10": 10, "01-b/step-2": 2, "01-b/step-100": 100})
    names = [str(folder.relative_to(root)) for folder in checkpoint_folders(root)]
    assert names == ["01-b/step-100", "01-b/step-2", "00-a/step-10", "00-a/step-9"]
    (root / "01-b/step-100/state.json").write_text("{}")
    (root / "01-b/step-2/manifest.json").unlink()
    (root / "01-b/.step-200.partial").mkdir()
    found = Checkpoints(config).find()
    assert found.folder == root / "00-a/step-10" and found.step == 10
    assert "step-100 is skipped: state.json has 2 bytes" in caplog.text
    assert "step-2 is skipped: manifest.json is missing" in caplog.text

    path = load_config("mini_mtil_dac", [f"run_dir={tmp_path}", f"resume={root / '00-a/step-9'}"])
    assert Checkpoints(path).find().step == 9
    for folder in checkpoint_folders(root):
        shutil.copytree(folder, tmp_path / "other/checkpoints" / folder.relative_to(root))
        (tmp_path / "other/checkpoints" / folder.relative_to(root) / "state.json").write_text("{}")
    with pytest.raises(InputError, match="none of 4 checkpoints is whole; resume=never starts over"):
        Checkpoints(load_config("mini_mtil_dac", [f"run_dir={tmp_path / 'other'}"])).find()
    broken = load_config("mini_mtil_dac", [f"run_dir={tmp_path}", f"resume={root / '01-b/step-2'}"])
    with pytest.raises(InputError, match="resume=.*step-2: not a whole checkpoint: manifest.json is missing"):
        Checkpoints(broken).find()
    assert Checkpoints(load_config("mini_mtil_dac", [f"run_dir={tmp_path}", "resume=never"])).find() is None
    assert not root.exists()


def test_another_configuration_is_refused_with_a_readable_difference(tmp_path: Path) -> None:
    before = load_config("mini_mtil_dac", [f"run_dir={tmp_path}"])
    write_steps(tmp_path / "checkpoints", before, {"00-a/step-2": 2})
    free = [
        "deepspeed.config=zero3",
        "data.workers=3",
        "log.every_steps=7",
        "checkpoint.keep=5",
        "faults.hang_minutes=1",
    ]
    assert Checkpoints(load_config("mini_mtil_dac", [f"run_dir={tmp_path}", *free])).find().step == 2
    now = load_config("mini_mtil_dac", [f"run_dir={tmp_path}", "train.lr=0.5", "options.guide.text=eot"])
    with pytest.raises(InputError) as caught:
        Checkpoints(now).find()
    message = str(caught.value)
    assert "options.guide.text: first there, eot here; train.lr: 0.01 there, 0.5 here" in message
    assert "resume=never" in message and "\n" not in message


# Every key, by whether it may change between two starts of a run, with another value than `mini_mtil` has.
MAY_CHANGE = {
    "backbone.feature_cache_dir": "elsewhere",
    "backbone.feature_cache_dir_gb": "3",
    "run_dir": "elsewhere",
    "resume": "never",
    "data.workers": "1",
    "data.cache_dir": "elsewhere",
    "data.cache_gb": "3",
    "evaluation.batch_size": "3",
    "backbone.gradient_checkpointing": "true",
    "train.compile": "true",
    "deepspeed.config": "zero3",
    "deepspeed.overrides": "{zero_optimization: {reduce_bucket_size: 3}}",
    "log.every_steps": "3",
    "log.trackers": "[tensorboard]",
    "checkpoint.every_steps": "3",
    "checkpoint.keep": "3",
    "faults.not_finite": "skip",
    "faults.hang_minutes": "3",
}
MUST_STAY = {
    "seed": "3",
    "method": "lora",
    "stream": "elsewhere",
    "order": "elsewhere",
    "tasks": "[fashion]",
    "backbone.kind": "llava",
    "backbone.name": "ViT-B-16",
    "backbone.pretrained": "elsewhere",
    "backbone.force_quick_gelu": "true",
    "backbone.attn_implementation": "eager",
    "backbone.feature_cache_gb": "3",
    "options": "{rank: 9}",
    "targets.towers": "[text]",
    "targets.layers": "[q]",
    "train.iterations": "3",
    "train.global_batch_size": "3",
    "train.gradient_accumulation_steps": "2",
    "train.lr": "3",
    "train.min_lr": "1e-7",
    "train.warmup_steps": "3",
    "train.weight_decay": "3",
    "train.betas": "[0.3, 0.3]",
    "train.gradient_clipping": "3",
    "train.precision": "bf16",
    "train.average_over": "samples",
    "train.per_task": "{fashion: {lr: 3}}",
    "data.shots": "3",
    "data.samples": "3",
    "data.group_by_length": "3",
    "data.packing": "true",
    "data.shuffle_shards": "3",
    "data.replay_share": "0.3",
    "data.reference": "elsewhere",
    "data.reference_share": "0.3",
    "data.max_bad_fraction": "0.3",
    "data.evaluate_on": "validation",
    "data.augment": "false",
    "data.blind": "true",
}
NEEDED_BESIDE = {
    "data.reference": ["data.reference_share=0.3"],
    "data.reference_share": ["data.reference=elsewhere"],
    "backbone.attn_implementation": ["backbone.kind=llava"],
    "data.blind": ["backbone.kind=llava"],
    "data.packing": ["backbone.kind=llava"],
}


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_is_known_to_stay_or_to_be_free() -> None:
    assert set(keys_of(RunConfig)) == MAY_CHANGE.keys() | MUST_STAY.keys() | {"extend"}
    assert not MAY_CHANGE.keys() & MUST_STAY.keys()


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_a_free_key_may_change(key: str) -> None:
    before, now = load_config("mini_mtil_dac"), load_config("mini_mtil_dac", [f"{key}={MAY_CHANGE[key]}"])
    assert before != now and config_differences(before, now) == config_differences(now, before) == []


@pytest.mark.parametrize("key", MUST_STAY)
def test_any_other_key_must_stay(key: str) -> None:
    before = load_config("mini_mtil_dac")
    now = load_config("mini_mtil_dac", [f"{key}={MUST_STAY[key]}", *NEEDED_BESIDE.get(key, ())])
    differences = config_differences(before, now)
    assert all(" there, " in difference and difference.endswith(" here") for difference in differences)
    named = [difference.partition(":")[0] for difference in differences]
    assert any(name == key or name.startswith(f"{key}.") for name in named)


def test_the_page_names_the_keys_that_may_change() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8").split())
    section = page.partition("## What may change between two starts")[2].partition("and the number of ranks")[0]
    named = re.findall(r"`([\w.]+)`", section)
    covered = {key for key in MAY_CHANGE if any(key == name or key.startswith(f"{name}.") for name in named)}
    assert covered == MAY_CHANGE.keys()
    assert not any(key.startswith(f"{name}.") or key == name for name in named for key in MUST_STAY)


def test_more_tasks_are_no_other_configuration_but_fewer_are() -> None:
    one, two = (load_config("mini_mtil_dac", [f"extend={tasks}"]) for tasks in ("[a:x]", "[a:x, a:y]"))
    assert config_differences(one, two) == []
    assert config_differences(two, one) == ["extend: ['a:x', 'a:y'] there, ['a:x'] here"]
