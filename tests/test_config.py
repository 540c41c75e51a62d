"""The run configuration: what it holds, where values come from, and one clear line for each mistake."""

import json
import os
from pathlib import Path

import pytest
import yaml

from r1p_dist.config import RunConfig
from r1p_dist.ds_config import OF_NUMBERS, OWNED_KEYS, REMOVED_KEYS, TOP_LEVEL_KEYS, ZERO_KEYS, load_deepspeed_config
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from r1p_dist.safe_yaml import parse_yaml, write_yaml
from r1p_dist.shipped import shipped_files

RECIPES = sorted(shipped_files("recipes", ".yaml"))
DS_CONFIGS = sorted(shipped_files("ds_configs", ".json"))


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _error(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_its_dump_loads_to_the_same(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.run_dir == Path("runs") / name
    kept = load_config(_write(tmp_path / "config.yaml", config.dump()))
    assert kept == config.model_copy(update={"run_dir": Path.cwd() / "runs" / name})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_how_long_and_what_to_expect(name: str) -> None:
    lines = shipped_files("recipes", ".yaml")[name].read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["# What", "# How long"]
    assert any(line.startswith("# Expected:") for line in lines)


def test_defaults_are_the_papers_pool_and_training(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path / "empty.yaml", "# nothing\n"))
    assert [config.options[key] for key in ("rank", "alpha", "active", "merged")] == [12, 1.0, 8, 4]
    assert config.options["ago"] == {"weight": 0.1, "reduction": "sum_top"}
    assert (config.train.lr, config.train.min_lr, config.train.weight_decay) == (2e-3, 1e-6, 1e-2)
    assert (config.train.iterations, config.train.global_batch_size) == (500, 32)
    assert config.targets.towers == ["image", "text"]
    assert config.targets.layers == ["q", "k", "v", "out", "gate", "fc1", "fc2"]


def test_paper_recipes_have_the_published_learning_rates() -> None:
    first = load_config("dac_paper")
    assert (first.seed, first.data.shots, first.options["dropout"], first.train.lr) == (42, 5, 0.2, 2e-3)
    second = load_config("dac_paper_order2")
    order = "StanfordCars Food MNIST OxfordPet Flowers SUN397 Aircraft Caltech101 DTD EuroSAT CIFAR100".split()
    published = [2e-3, 2e-3, 1e-3, 2e-3, 2e-3, 2e-3, 3e-3, 2e-3, 2e-3, 1e-3, 3e-3]
    assert [second.train.for_task(task).lr for task in order] == published
    assert second.model_copy(update={"run_dir": None, "order": None, "train": None}) == first.model_copy(
        update={"run_dir": None, "train": None}
    )


def test_overrides_win_over_the_recipe_and_the_recipe_over_its_base(tmp_path: Path) -> None:
    _write(tmp_path / "parent.yaml", "seed: 1\noptions: {rank: 6, active: 3, merged: 2}\ntrain: {lr: 1e-2}")
    child = _write(tmp_path / "child.yaml", "base: parent.yaml\nseed: 2\noptions: {active: 4}")
    config = load_config(child, ["options.merged=3", "tasks=[a, b]", "order=null", "train.betas=[0.8, 0.9]"])
    assert [config.options[key] for key in ("rank", "active", "merged")] == [6, 4, 3]
    assert (config.seed, config.train.lr, config.train.betas) == (2, 1e-2, (0.8, 0.9))
    assert (config.tasks, config.order) == (["a", "b"], None)


def test_base_may_be_a_shipped_recipe(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path / "mine.yaml", "base: mini_mtil_dac\nseed: 7"))
    assert config.model_copy(update={"seed": 0, "run_dir": None}) == load_config("mini_mtil_dac").model_copy(
        update={"run_dir": None}
    )


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_numbers_with_an_exponent_are_numbers_also_where_no_type_is_known(text: str) -> None:
    config = load_config("mini_mtil_dac", [f"train.lr={text}", f"deepspeed.overrides.gradient_predivide_factor={text}"])
    assert config.train.lr == config.deepspeed.overrides["gradient_predivide_factor"] == 1e-3


# as people write them: the value, or None where the option cannot mean it
@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("008", 8), ("1_000", 1000), ("1e3", 1000), ("0x10", 16), ("0o10", 8), ("+7", 7)]
    + [
        (text, None)
        for text in ("1:30", "1_", "0b11", "1,000", "10%", "1.5", "-1", "1e30", "yes", "2024-01-01", ".inf")
    ],
)
def test_numbers_are_those_that_people_write(text: str, value: int | None, tmp_path: Path) -> None:
    recipe = _write(tmp_path / "mine.yaml", f"seed: {text}\ntrain:\n  iterations: {text}")
    for arguments in ((recipe,), ("mini_mtil_smoke", [f"seed={text}", f"train.iterations={text}"])):
        if value is None:
            message = _error(*arguments)
            assert "seed=" in message and "train.iterations=" in message
        else:
            config = load_config(*arguments)
            assert (config.seed, config.train.iterations) == (value, value)


def test_words_stay_words(tmp_path: Path) -> None:
    names = ["no", "on", "007", "1:30", "2024-01-01", "1e5x", "=", "0b1"]
    config = load_config("mini_mtil_dac", [f"tasks=[{', '.join(names)}]", "train.compile=no"])
    assert config.tasks == names and config.train.compile is False
    assert load_config(_write(tmp_path / "config.yaml", config.dump())).tasks == names
    for text in ("1e3", "0o17", "yes", "1:30", "~", "010", "1_0", "null", "<<", ""):
        assert parse_yaml(write_yaml({text: [text]}), "") == {text: [text]}


PLACES = ["stream", "data.reference", "deepspeed.config", "backbone.name", "resume", "extend", "options.anchor"]


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A recipe in a folder of its own, which names all kinds of places beside it."""
    for name in ("pictures/stream.yaml", "clip/open_clip_config.json", "kept/state.json", "ds.json", "a.safetensors"):
        (tmp_path / "lab" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lab" / name).write_text("{}")
    values = ["pictures", "pictures/stream.yaml", "ds.json", "local-dir:clip", "kept", "[pictures:task, mini_mtil]"]
    lines = [f"{key}={value}" for key, value in zip(PLACES, [*values, "a.safetensors"], strict=True)]
    tree: dict = {}
    for line in [*lines, "method=steady", "data.reference_share=0.1"]:
        *sections, key = line.partition("=")[0].split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = parse_yaml(line.partition("=")[2], "")
    return _write(tmp_path / "lab/mine.yaml", yaml.safe_dump(tree))


def _places_of(config: RunConfig) -> list:
    values = [config.model_dump()] * len(PLACES)
    for at, key in enumerate(PLACES):
        for part in key.split("."):
            values[at] = values[at][part]
    return values


def test_paths_are_resolved_where_they_are_written(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = places.parent
    expected = [f"{lab}/pictures", f"{lab}/pictures/stream.yaml", f"{lab}/ds.json", f"local-dir:{lab}/clip"]
    expected += [f"{lab}/kept", [f"{lab}/pictures:task", "mini_mtil"], f"{lab}/a.safetensors"]
    monkeypatch.chdir(tmp_path)
    config = load_config("lab/mine.yaml", ["run_dir=runs/one", "data.cache_dir=cache"])
    assert _places_of(config) == expected
    # on the command line: from where it is typed
    words = ["stream=lab/pictures", "deepspeed.config=lab/ds.json", "backbone.name=local-dir:lab/clip"]
    assert _places_of(load_config("lab/mine.yaml", words)) == expected
    # the folder of a run says the same from anywhere
    kept = _write(tmp_path / "config.yaml", config.dump())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_config(kept)
    assert _places_of(again) == expected
    assert (again.run_dir, again.data.cache_dir) == (tmp_path / "runs/one", tmp_path / "cache")


def test_names_are_not_taken_for_what_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mini_mtil", "tiny", "auto", "zero2"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = load_config("mini_mtil_dac")
    names = (config.stream, config.backbone.name, config.resume, config.deepspeed.config)
    assert names == ("mini_mtil", "tiny", "auto", "zero2")


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    _write(tmp_path / "pictures/stream.yaml", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("mini_mtil_dac", ["run_dir=~/run", "stream=~/pictures"])
    assert (config.run_dir, config.stream) == (tmp_path / "run", str(tmp_path / "pictures"))


def test_task_entry_lays_over_the_common_training() -> None:
    train = load_config("mini_mtil_dac", ["train.lr=1e-2", "train.per_task.fashion.iterations=7"]).train
    assert (train.for_task("fashion").iterations, train.for_task("fashion").lr) == (7, 1e-2)
    assert train.for_task("other").iterations == train.iterations


def test_missing_recipe_names_the_recipes_that_exist() -> None:
    message = _error("mini_mtill")
    assert "did you mean mini_mtil?" in message
    assert all(name in message for name in RECIPES)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate=1", "did you mean train.lr?"),
        ("train.learning-rate=1", "did you mean train.lr?"),
        ("batch_size=8", "did you mean train.global_batch_size (of all ranks together) or evaluation.batch_size?"),
        ("train.batch_size=8", "did you mean train.global_batch_size (of all ranks together) or"),
        ("epochs=3", "did you mean train.iterations (optimizer steps of a task; there are no epochs)?"),
        ("model=ViT-B-16", "did you mean backbone.name?"),
        ("dataset=shards", "did you mean stream?"),
        ("output_dir=runs/a", "did you mean run_dir?"),
        ("train.iteration=3", "unknown key train.iteration; did you mean train.iterations?"),
        ("lr=1e-3", "did you mean train.lr?"),
        ("option.rank=4", "did you mean options?"),
        ("options.rnk=4", "unknown key options.rnk of method=dac; did you mean options.rank?"),
        ("options.ago.wait=4", "unknown key options.ago.wait of method=dac; did you mean options.ago.weight?"),
        ("train.per_task.fashion.lrr=1", "did you mean train.per_task.fashion.lr?"),
        ("train.per_task.fashion.betas=[0, 0]", "unknown key train.per_task.fashion.betas"),
        ("base=mini_mtil", "unknown key base"),
    ],
)
def test_unknown_override_names_the_nearest_key(override: str, expected: str) -> None:
    message = _error("mini_mtil_dac", [override])
    assert message.startswith("command line: ")
    assert expected in message
    assert "allowed: " in message


def test_unknown_key_in_a_recipe_names_the_file_it_stands_in(tmp_path: Path) -> None:
    parent = _write(tmp_path / "parent.yaml", "options: {ranks: 6}")
    child = _write(tmp_path / "child.yaml", "base: parent.yaml\nseed: 2")
    assert _error(child).startswith(f"{parent}: unknown key options.ranks of method=dac; did you mean options.rank?")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=fast", "train.lr='fast': "),
        ("train.lr=true", "train.lr=True: must be a number"),
        ("train.lr=-1", "train.lr=-1: "),
        ("train.lr=.nan", "train.lr=nan: "),
        ("train.iterations=1.5", "train.iterations=1.5: "),
        ("train.iterations=0", "train.iterations=0: "),
        ("train=3", "train=3: must be a mapping of keys to values; did you mean train.iterations=3?"),
        (
            "backbone=ViT-B-16",
            "backbone='ViT-B-16': must be a mapping of keys to values; did you mean backbone.name=ViT",
        ),
        ("tasks=fashion", "tasks='fashion': must be a list: write tasks=[fashion]"),
        ("tasks=fashion,cards", "tasks='fashion,cards': must be a list: write tasks=[fashion,cards]"),
        ("train.betas=0.9", "train.betas=0.9: must be a list: write train.betas=[0.9]"),
        ("seed.x=3", "seed={'x': 3}: "),
        ("options.vote=late", "options.vote='late': input should be 'global', 'lagged' or 'local'"),
        ("options.dropout=1", "options.dropout=1: "),
        ("tasks=[]", "tasks=[]: "),
        ("tasks=[a, a]", "tasks=['a', 'a']: names the same entry twice"),
        ("train.betas=[0.9]", "train.betas"),
        ("data.shots=-1", "data.shots=-1: "),
        ("deepspeed.overrides=3", "deepspeed.overrides=3: must be a mapping"),
    ],
)
def test_wrong_value_names_source_key_value_and_reason(override: str, expected: str) -> None:
    assert _error("mini_mtil_dac", [override]).startswith(f"command line: {expected}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["options.merged=9"], "options.merged=9 must not be larger than options.active=8"),
        (["options.active=13"], "options.active=13 must not be larger than options.rank=12"),
        (["options.rank=2"], "options.active=8 must not be larger than options.rank=2"),
        (
            ["train.gradient_accumulation_steps=5"],
            "train.global_batch_size=32 must be a multiple of train.gradient_accumulation_steps=5",
        ),
        (["targets.layers=[q, z]"], "targets.layers: a backbone of kind open_clip has no 'z'; it has q, k, v, out"),
        (["backbone.kind=clip"], "backbone.kind='clip': must be one of llava, open_clip, got 'clip'"),
        (
            ["backbone.kind=llava", "backbone.pretrained=openai"],
            "backbone.pretrained=openai: not for backbone.kind=llava; a llava model's name says where its weights are",
        ),
        (["train.min_lr=1", "train.lr=5e-3"], "train.min_lr=1.0 must not be larger than train.lr=0.005"),
        (["train.per_task.a.warmup_steps=100", "train.iterations=100"], "must be smaller than train.per_task.a.iter"),
    ],
)
def test_values_that_contradict_each_other_are_both_named(overrides: list[str], expected: str) -> None:
    message = _error("mini_mtil_dac", overrides)
    assert expected in message
    assert "command line" in message


@pytest.mark.parametrize("override", ["seed", "=3", "pool.=3", ".seed=1", "--seed"])
def test_override_without_key_or_value_is_refused(override: str) -> None:
    assert "is not an override; write key.sub=value" in _error("mini_mtil_dac", [override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b", "a recipe is a mapping of keys to values, this file holds a list"),
        ("just words", "this file holds a str"),
        ("seed: 1\nseed: 2", "'seed' stands there twice"),
        ("seed: [1", "not valid YAML"),
        ("seed: \x00", "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ("? [a]\n: 1", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("base: 3", "must be the name or path of a recipe"),
        ("base: nowhere", "no file and no shipped recipe"),
    ],
)
def test_malformed_recipe_is_one_line_that_names_the_file(text: str, expected: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.yaml", text)
    message = _error(path)
    assert message.startswith(str(path))
    assert expected in message


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfseed: 3\r\nmethod: lora\r\n", "\ufeffseed: 3\r\nmethod: lora\r\n".encode("utf-16-le")],
    ids=["mark and CRLF", "UTF-16"],
)
def test_files_of_other_systems_say_the_same(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "méthode 1.yaml"
    path.write_bytes(content)
    config = load_config(path)
    assert (config.seed, config.method, config.run_dir) == (3, "lora", Path("runs/méthode 1"))
    deepspeed = tmp_path / "mine.json"
    deepspeed.write_bytes(b"\xef\xbb\xbf" + b'{"zero_optimization": {"stage": 1}}\r\n')
    assert load_config(path, [f"deepspeed.config={deepspeed}"]).deepspeed.config == str(deepspeed)


@pytest.mark.parametrize(
    ("content", "line"), [(b"\xff\xfe\xfa", 1), ("# Größe\nseed: 1".encode("latin-1"), 1), (b"seed: 1\n\xa0", 2)]
)
def test_a_file_in_another_encoding_is_one_line_that_names_file_and_line(
    content: bytes, line: int, tmp_path: Path
) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(content)
    assert _error(path).startswith(f"{path}: line {line} is no UTF-8 text (")
    assert _error("mini_mtil_dac", [f"deepspeed.config={path}"]).startswith(f"{path}: line {line} is no UTF-8 text (")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.yaml"))
    path.write_text("seed: 1")
    assert "must be a name in UTF-8" in _error(path)


def test_recipes_that_are_each_others_base_are_refused(tmp_path: Path) -> None:
    first = _write(tmp_path / "first.yaml", "base: second.yaml")
    _write(tmp_path / "second.yaml", "base: first.yaml")
    assert "first.yaml -> second.yaml -> first.yaml" in _error(first)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path / "empty.yaml", "# nothing\n"))
    assert config.model_copy(update={"options": {}}) == RunConfig(run_dir=Path("runs/empty"))


@pytest.mark.parametrize("key", ["pool.rank", "ago.weight", "lora.restart"])
def test_a_moved_key_is_refused_with_its_new_name(key: str) -> None:
    new = {"pool.rank": "options.rank", "ago.weight": "options.ago.weight", "lora.restart": "options.restart"}[key]
    assert f"{key} has moved: write {new}" in _error("mini_mtil_dac", [f"{key}=1"])


def test_another_method_drops_the_options_below_it_and_reads_its_own(tmp_path: Path) -> None:
    parent = _write(tmp_path / "parent.yaml", "options: {active: 5}")
    child = _write(tmp_path / "child.yaml", f"base: {parent}\nmethod: lora\noptions: {{rank: 3}}")
    for config in (load_config(child), load_config(parent, ["options.rank=3", "method=lora"])):
        assert config.options == {"rank": 3, "alpha": 1.0, "dropout": 0.0, "restart": False}
    message = _error(child, ["options.active=5"])
    assert message == (
        "command line: unknown key options.active of method=lora; allowed: rank, alpha, dropout, restart"
    )


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_every_deepspeed_file_is_valid_for_the_installed_deepspeed(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_deepspeed_config(name, {})
    assert not config.keys() & OWNED_KEYS.keys()
    # absent would mean 1.0
    assert config["gradient_clipping"] == 0.0
    assert config["zero_allow_untested_optimizer"] is True
    batch_sizes = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    parsed = DeepSpeedConfig(config | batch_sizes)
    assert name.startswith(f"zero{parsed.zero_optimization_stage}")


def test_our_deepspeed_key_lists_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    removed_zero = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(REMOVED_KEYS) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | removed_zero
    fields = {field.alias or name: field for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert fields.keys() == ZERO_KEYS
    assert {name for name, field in fields.items() if field.annotation is int} == {
        name for name in ZERO_KEYS if name.endswith(OF_NUMBERS)
    }
    assert not TOP_LEVEL_KEYS & (REMOVED_KEYS.keys() | OWNED_KEYS.keys())


def test_deepspeed_overrides_come_through_the_common_mechanism() -> None:
    config = load_config(
        "mini_mtil_dac",
        [
            "deepspeed.overrides.zero_optimization.stage=3",
            "deepspeed.overrides.zero_optimization.reduce_bucket_size=5e8",
        ],
    )
    merged = load_deepspeed_config(config.deepspeed.config, config.deepspeed.overrides)
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5e8
    assert merged["zero_optimization"]["contiguous_gradients"] is True
    assert load_deepspeed_config("zero2", {})["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("elasticity", {}, "has removed elasticity"),
        ("zero_optimization", {"mics_shard_size": 2}, "has removed zero_optimization.mics_shard_size"),
        ("gradient_cliping", 1.0, "unknown DeepSpeed key gradient_cliping; did you mean gradient_clipping?"),
        ("zero_optimization", {"stag": 2}, "did you mean zero_optimization.stage?"),
        ("zero_optimization", 2, "zero_optimization must be an object"),
        ("zero_optimization", {"stage": "two"}, "zero_optimization.stage='two': must be 0, 1, 2 or 3"),
        ("zero_optimization", {"stage": 7}, "zero_optimization.stage=7: must be 0, 1, 2 or 3"),
        ("zero_optimization", {"sub_group_size": "1:30"}, "zero_optimization.sub_group_size='1:30': must be a number"),
        ("zero_optimization", {"reduce_scatter": "maybe"}, "reduce_scatter='maybe': must be true or false"),
        ("train_batch_size", 32, "set train.global_batch_size instead"),
        ("bf16", {"enabled": True}, "set train.precision instead"),
        ("gradient_clipping", 1.0, "set train.gradient_clipping instead"),
    ],
)
def test_wrong_deepspeed_key_names_file_and_key(key: str, value: object, expected: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.json", json.dumps({key: value}))
    message = _error("mini_mtil_dac", [f"deepspeed.config={path}"])
    assert message.startswith(f"{path}: ")
    assert expected in message
    overriding = _error(
        "mini_mtil_dac", [f"deepspeed.overrides.{key}={yaml.safe_dump(value, default_flow_style=True)}"]
    )
    assert overriding.startswith("deepspeed.overrides over ")
    assert expected in overriding


@pytest.mark.parametrize("text", ["{", "[1]", '{"zero_optimization": {}, "zero_optimization": {}}', "\x00"])
def test_malformed_deepspeed_file_is_one_line_that_names_the_file(text: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.json", text)
    assert _error("mini_mtil_dac", [f"deepspeed.config={path}"]).startswith(f"{path}: ")


def test_missing_deepspeed_file_names_the_shipped_ones() -> None:
    message = _error("mini_mtil_dac", ["deepspeed.config=zero22"])
    assert "did you mean zero2?" in message
    assert all(name in message for name in DS_CONFIGS)
