"""What every method must pass, found by listing the folder: its author writes none of it (docs/add_a_method.md)."""

import hashlib
import json
import re
import shutil
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from peft import PeftModel
from transformers import CLIPModel

import r1p_dist.engine
from r1p_dist.adapters import Dense, Factors, LoRALinear
from r1p_dist.adapters.low_rank import full_values
from r1p_dist.backbones import load_backbone
from r1p_dist.distributed import rank, world_size
from r1p_dist.errors import InputError
from r1p_dist.export.run import export_run
from r1p_dist.fit import train_step
from r1p_dist.methods import make_method, method_class, shipped_methods
from r1p_dist.moments.file import write_moments
from r1p_dist.protocol import FullMethod, Method
from r1p_dist.recipes import load_config
from r1p_dist.train import run
from tests.export.fake_run import PROMPTS as PROMPTS_OF_EXPORT
from tests.export.fake_run import images, library_logits, library_model
from tests.methods.anchors import noise_moments
from tests.small_clip import make_backbone
from tests.small_llava import make_backbone as make_llava
from tests.stages import Stages
from tests.test_llava_parity import sample
from tests.test_parity import PROMPTS, global_batch
from tests.test_resume import SHORT, assert_equal, without_reports

ROOT = Path(__file__).parents[2]
METHODS = [name for name in shipped_methods() if method_class(name).trains]
GLOBAL_BATCH, TASKS = 8, 2
STEPS = (1, 2)  # of each task: what holds an update to the past is zero in the first step, where B is
SHARDED = "deepspeed.overrides.zero_optimization.stage3_param_persistence_threshold=0"
CHECKPOINTING = "backbone.gradient_checkpointing=true"
SETTINGS = {
    "stage 0": ["deepspeed.config=zero0"],
    "stage 1, accumulation": ["deepspeed.config=zero1", "train.gradient_accumulation_steps=2"],
    "stage 2, checkpointing": ["deepspeed.config=zero2", CHECKPOINTING],
    "stage 3, accumulation, checkpointing": [
        "deepspeed.config=zero3",
        SHARDED,
        "train.gradient_accumulation_steps=2",
        CHECKPOINTING,
    ],
}
# What all are compared with, on one rank: another batch comes in each micro step of an accumulation.
PLAIN, ACCUMULATED = "one rank", "one rank, accumulation"
ON_ONE_RANK = {
    PLAIN: ["deepspeed.config=zero0"],
    ACCUMULATED: ["deepspeed.config=zero0", "train.gradient_accumulation_steps=2"],
}


# All methods on two ranks take the last of the settings, and each one more, in turn: neighbours in this order override
# the same calls, so each kind of method meets all stages.
IN_TURN, ALWAYS = list(SETTINGS)[:-1], list(SETTINGS)[-1]
CALLS = ("step", "after_step", "losses", "loss", "further_data", "updates", "end", "begin", "prepare")
BY_KIND = sorted(
    METHODS, key=lambda name: [getattr(method_class(name), call) is getattr(Method, call) for call in CALLS]
)


# Cases of a method beside that of its `tiny`; ANCHOR: a file of moments.
FURTHER = {
    "so_ra, the code's step": ("so_ra", ["options.proximal=code"]),
    "steady, anchor, sketches": ("steady", ["options.anchor=ANCHOR", "options.sketch=8", "options.sketch_above=64"]),
}


def settings_of(name: str) -> tuple[str, ...]:
    return IN_TURN[BY_KIND.index(name) % len(IN_TURN)], ALWAYS


def options_of(name: str) -> list[str]:
    return [f"method={name}", *(f"options.{key}={value}" for key, value in method_class(name).tiny.items())]


class Loader:
    """Stands for a TrainLoader: global batches of a task that are a function of its number and the step."""

    prompts = PROMPTS

    def __init__(self, task: int, steps: int, accumulation: int) -> None:
        self._task, self._steps, self._accumulation = task, steps, accumulation

    def steps(self) -> Any:
        for step in range(self._steps):
            size = GLOBAL_BATCH // self._accumulation
            micro = [global_batch(self._task, step * self._accumulation + i, size) for i in range(self._accumulation)]
            yield [{name: value.chunk(world_size())[rank()] for name, value in batch.items()} for batch in micro]

    def check_faults(self) -> None:
        pass


def train(name: str, overrides: list[str]) -> dict[str, Any]:
    """Trains two tasks; returns losses, and what is trained and left, whole."""
    own = [
        f"train.global_batch_size={GLOBAL_BATCH}",
        f"train.iterations={max(STEPS)}",
        "train.lr=0.1",
        *options_of(name),
    ]
    config = load_config("mini_mtil_dac", [*own, *overrides])
    backbone = make_backbone(layers=1)  # ZeRO-3 takes its time per module; test_parity.py has more of them
    if config.backbone.gradient_checkpointing:
        backbone.checkpoint_blocks()
    r1p_dist.engine.make_optimizer = lambda parameters, train: torch.optim.SGD(parameters, lr=train.lr)
    method = make_method(config, backbone)
    method.stages(SimpleNamespace(tasks=tuple(SimpleNamespace(name=f"t{number}") for number in range(TASKS))))
    accumulation = config.train.gradient_accumulation_steps
    found: dict[str, Any] = {"losses": [], "values": [], "updates": [], "features": []}
    stages = Stages(method, config, lambda batches: Loader(task, batches or 2, accumulation))
    for task in range(TASKS):
        tasks = tuple(SimpleNamespace(name=f"t{number}") for number in range(TASKS))
        trainer = stages.begin(task, tasks)
        for number, request in enumerate(method.further_data(stages.stage, tasks[:task])):
            trainer.add_stream(request, Loader(7 + number, STEPS[task], accumulation))
        prepare = backbone.preparer(PROMPTS)
        for step, batches in enumerate(Loader(task, STEPS[task], accumulation).steps()):
            train_step(method, trainer, [prepare(batch) for batch in batches], config.train)
            trainer.step_number = step + 1
            found["losses"].append(stages.meter.read(0)[0]["loss"])
            found["values"].append(trained_values(method))
        stages.end()
        updates = [
            full_values(update.value)[0] if isinstance(update, Dense) else update.scaling * update.B @ update.A
            for update in stages.updates[-1].values()
        ]
        found["updates"].append(torch.cat([update.flatten() for update in updates]))
        features = backbone.eval()(image=global_batch(task, 0, 4)["image"])[0]
        found["features"].append(features.detach())
        stages.engine.close()
    return found


def trained_values(method: Method) -> torch.Tensor:
    """Returns what a method trains, whole and flat; of a LoRA B A, all that the model sees of it: A may be turned where
    singular values are nearly equal, and B with it."""
    loras = [adapter for adapter in method.adapters if isinstance(adapter, LoRALinear)]
    own = {parameter for adapter in loras for parameter in adapter.trainable_parameters().values()}
    others = [parameter for parameter in method.trainable_parameters().values() if parameter not in own]
    products = [update.B @ update.A for update in (adapter.update() for adapter in loras)]
    return torch.cat([value.flatten() for value in [*products, *full_values(*others)]])


def train_all(rank: int, world_size: int, cases: dict[str, tuple[str, list[str]]]) -> dict[str, Any]:
    """cases: of each method and options. Returns by case and setting what `train` does."""
    found = {}
    for case, (name, options) in cases.items():
        settings = ON_ONE_RANK if world_size == 1 else {setting: SETTINGS[setting] for setting in settings_of(name)}
        found[case] = {setting: train(name, [*options, *own]) for setting, own in settings.items()}
    return found


@pytest.fixture(scope="module")
def trained(run_distributed, tmp_path_factory) -> dict[int, dict[str, Any]]:
    anchor = tmp_path_factory.mktemp("anchor") / "moments"
    steady = make_method(load_config("mini_mtil_dac", options_of("steady")), make_backbone(layers=1))
    write_moments(anchor, keep=100, **noise_moments(steady))
    cases = {name: (name, []) for name in METHODS}
    for case, (name, options) in FURTHER.items():
        cases[case] = (name, [option.replace("ANCHOR", str(anchor)) for option in options])
    return {world: run_distributed(train_all, world, cases, timeout_s=1100)[0] for world in (1, 2)}


@pytest.mark.parametrize("name", [*METHODS, *FURTHER])
def test_ranks_stages_accumulation_and_checkpointing_change_nothing(trained, name: str) -> None:
    one, several = trained[1][name], trained[2][name]
    plain = one[PLAIN]
    assert (plain["values"][-2] - plain["values"][-1]).norm() > 0 and (plain["updates"][0].norm() > 0)
    for case, result in several.items():
        other = one[ACCUMULATED] if "accumulation" in case else plain
        torch.testing.assert_close(result["losses"], other["losses"], rtol=1e-4, atol=1e-5, msg=f"{case}: losses")
        for key in ("values", "updates", "features"):
            for ours, theirs in zip(result[key], other[key], strict=True):
                assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6, (case, key)


@pytest.mark.parametrize("name", METHODS)
def test_options_go_round_and_others_are_named(name: str, tmp_path: Path) -> None:
    config = load_config("mini_mtil_dac", [f"run_dir={tmp_path}/run", *options_of(name)])
    (tmp_path / "config.yaml").write_text(config.dump())
    assert load_config(tmp_path / "config.yaml") == config
    assert set(config.options) == set(method_class(name).Options.model_fields)
    with pytest.raises(InputError, match=rf"unknown key options.nonsense of method={name}; allowed: "):
        load_config("mini_mtil_dac", [f"method={name}", "options.nonsense=1"])


@pytest.mark.parametrize("name", shipped_methods())
def test_nothing_else_knows_its_name(name: str) -> None:
    package = ROOT / "r1p_dist"
    # tables: what is compared with what, and where sections of old recipes went
    aside = [package / f"methods/{name}.py", package / "evaluation/comparison.py", package / "recipe_files.py"]
    if name == "dac":  # whose pool is for one's own loop too
        aside.append(package / "attached_pool.py")
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8").replace('method: str = "dac"', "")  # the default
        if path not in aside:
            assert not re.search(rf"methods\.{name}\b|[\"']{name}[\"']", text), f"{path} knows {name}"


@pytest.mark.parametrize("name", shipped_methods())
def test_it_says_what_it_is(name: str) -> None:
    method = method_class(name)
    assert (method.__doc__ or "").strip() and method.inference in ("merged", "task_id", "routed")
    assert all(field.description for field in method.Options.model_fields.values())


class Noted(dict):
    """What a stage left in memory; notes the stage where somebody reads any of it."""

    def __init__(self, memory: dict[str, torch.Tensor], stage: int, read: set[int]) -> None:
        super().__init__(memory)
        self._stage, self._read = stage, read

    def __getitem__(self, name: str) -> torch.Tensor:
        self._read.add(self._stage)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


@torch.no_grad()
def outputs(method: Method, task: Any, batch: dict) -> torch.Tensor:
    with method.select(task):
        return torch.cat(method.backbone.outputs(method.backbone, batch))


def count_numbers(*found: dict[str, Any]) -> int:
    """Returns how many numbers updates and memories have."""
    tensors = []
    for value in [value for values in found for value in values.values()]:
        tensors += [value.A, value.B] if isinstance(value, Factors) else [getattr(value, "value", value)]
    return sum(tensor.numel() for tensor in tensors)


def leaves_something_else(trained: dict[str, Any], left: dict[str, Any]) -> bool:
    def whole(update: Any) -> torch.Tensor:
        return update.scaling * update.B @ update.A if isinstance(update, Factors) else update

    return any(not torch.allclose(whole(update), whole(left[name]), atol=1e-7) for name, update in trained.items())


class Talks(Loader):
    """As Loader on one rank, of conversations."""

    def steps(self) -> Any:
        for step in range(self._steps):
            yield [{**collated(self._task, step)}]


@cache
def collated(task: int, step: int) -> dict[str, torch.Tensor]:
    encoder = make_llava().encoder(load_config("mini_instruct").data)
    talks = [sample(task, GLOBAL_BATCH * step + number) for number in range(GLOBAL_BATCH)]
    return encoder.collate([encoder.train(talk, torch.Generator()) for talk in talks])


def deploy_three_tasks(rank: int, world_size: int, names: list[str], kind: str) -> dict[str, Any]:
    """Trains three tasks of a step each; returns what the model gives out around each merge, and how many numbers of
    past tasks each one needed: updates that were deployed or trained on, and memory that was read."""
    found, tasks = {}, tuple(SimpleNamespace(name=f"t{number}") for number in range(3))
    make_loader = Talks if kind == "llava" else Loader
    for name in names:
        own = [f"train.global_batch_size={GLOBAL_BATCH}", "train.lr=0.05", "train.iterations=1", *options_of(name)]
        try:
            config = load_config("mini_mtil_dac", [*own, "deepspeed.config=zero0", f"backbone.kind={kind}"])
        except InputError as error:
            found[name] = str(error)
            continue
        backbone = make_llava() if kind == "llava" else make_backbone(layers=1)
        method = make_method(config, backbone)
        method.stages(SimpleNamespace(tasks=tasks))
        stages = Stages(method, config)
        merges, needed = [], []
        for number, task in enumerate(tasks):
            stages.scan_loader = lambda batches, number=number: make_loader(number, batches or 2, 1)
            read: set[int] = set()
            stages.memory = [Noted(memory, stage, read) for stage, memory in enumerate(stages.memory)]
            trainer = stages.begin(number, tasks)
            for place, request in enumerate(method.further_data(stages.stage, tasks[:number])):
                trainer.add_stream(request, make_loader(7 + place, 1, 1))
            batch = backbone.preparer(PROMPTS)(next(make_loader(number, 1, 1).steps())[0])
            train_step(method, trainer, [batch], config.train)
            with torch.no_grad():
                in_training = torch.cat(backbone.outputs(backbone, batch))
            values = trained_values(method)
            trained = {**method.trained()} if method.adapters else {"values": values}
            backbone.eval()
            with method.before_merge():
                before = outputs(method, task, batch)
            stages.end()
            after = outputs(method, task, batch)
            left = stages.updates[-1] if method.adapters else {"values": trained_values(method)}
            merges.append((in_training, before, after, leaves_something_else(trained, left)))
            for past in tasks[:number]:
                outputs(method, past, batch)
            used = {*method.deployed(number), *method.merged(number)}
            needed.append(count_numbers(*(stages.updates[i] for i in used), *(stages.memory[i] for i in read)))
            stages.engine.close()
        left = [count_numbers(memory) for memory in stages.memory]
        found[name] = {"merges": merges, "needed": needed, "memory": left, "adds_up": method.tasks_add_up}
    return found


@pytest.fixture(scope="module", params=["open_clip", "llava"])
def deployed(run_distributed, request) -> dict[str, Any]:
    return run_distributed(deploy_three_tasks, 1, METHODS, request.param, timeout_s=1100)[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_changes_nothing_unless_the_method_leaves_something_else(deployed, name: str) -> None:
    if isinstance(deployed[name], str):
        assert re.search(f"method={name}.* CLIP", deployed[name])
        return
    for in_training, before, after, is_other in deployed[name]["merges"]:
        assert before.isfinite().all()
        if name != "dac":  # in training each batch has its own experts
            torch.testing.assert_close(before, in_training, rtol=1e-3, atol=1e-5)
        gap = (after - before).norm() / before.norm()
        assert gap > 1e-6 if is_other else gap < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_what_further_tasks_need_grows_where_the_method_says_so(deployed, name: str) -> None:
    if isinstance(deployed[name], str):
        return
    found, stores = deployed[name], method_class(name).stores
    _, second, third = found["needed"]
    grows = found["adds_up"] or ("each task" in stores and "samples" not in stores)
    assert 0 < second < third if grows else 0 < second == third
    assert stores != "nothing" or not any(found["memory"])


def losses_after_other_forwards(compute: Any, backbone: Any, count: int, model: Any, batch: dict) -> dict:
    result = compute(model, batch)
    for _ in range(count):
        backbone(image=batch["image"].flip(0), tokens=batch["tokens"], end=batch["end"])
    return result


def forward_twice(rank: int, world_size: int, names: list[str]) -> dict[str, bool]:
    found = {}
    for name in names:
        states = []
        for times in (1, 2):
            config = load_config("mini_mtil_dac", [f"train.global_batch_size={GLOBAL_BATCH}", *options_of(name)])
            backbone = make_backbone(layers=1)
            method = make_method(config, backbone)
            method.stages(SimpleNamespace(tasks=(SimpleNamespace(name="t0"),)))
            stages = Stages(method, config, lambda batches: Loader(0, batches or 2, 1))
            tasks = (SimpleNamespace(name="t0"),)
            stages.begin(0, tasks)
            batch = backbone.preparer(PROMPTS)(next(Loader(0, 1, 1).steps())[0])

            method.losses = partial(losses_after_other_forwards, method.losses, backbone, times - 1)
            loss, _ = method.loss(stages.engine, batch)
            stages.engine.step(loss)
            values = [value.flatten() for value in full_values(*method.trainable_parameters().values())]
            states.append([loss.detach()[None], *values, *(v.flatten().float() for v in method.state().values())])
            stages.engine.close()
        found[name] = all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    return found


def test_a_second_forward_in_a_micro_batch_changes_nothing(run_distributed) -> None:
    assert all(run_distributed(forward_twice, 2, METHODS, timeout_s=1100)[0].values())


def note_weights(name: str, seen: dict[str, list[str]]) -> None:
    """Has a method write down with which weights each run calls `prepare` and `begin`."""
    kind = method_class(name)

    def noted(call: str) -> Any:
        own = getattr(kind, call)

        def note(method: Method, stage: Any, *rest: Any) -> None:
            kept = {parameter for adapter in method.adapters for parameter in adapter.linear.parameters()}
            own_values = {parameter for adapter in method.adapters for parameter in adapter.parameters()} - kept
            own_values |= set(method.trainable_parameters().values())
            left_out = own_values if call == "prepare" else set()  # which sets them
            digest = hashlib.sha256()
            for parameter in method.backbone.parameters():
                digest.update(b"" if parameter in left_out else parameter.detach().numpy().tobytes())
            key = f"{Path(method.config.run_dir).name}: {call} {getattr(stage, 'name', stage)}"
            seen.setdefault(key, []).append(digest.hexdigest())
            own(method, stage, *rest)

        return note

    kind.prepare, kind.begin = noted("prepare"), noted("begin")


def run_and_resume(rank: int, world_size: int, folder: str, toy: list[str], names: list[str]) -> dict[str, Any]:
    """Runs each method in FOLDER/NAME/calm, and in FOLDER/NAME/stopped from the second step of its last stage: as after
    a kill there, for what signals do is the same for all (test_resume.py). Returns with which weights stages began."""
    without_reports()
    found: dict[str, Any] = {}
    for name in names:
        note_weights(name, found.setdefault(name, {}))
        calm, stopped = (Path(folder, name, part) for part in ("calm", "stopped"))
        own = ["train.global_batch_size=4", "deepspeed.config=zero2", "checkpoint.every_steps=2", "checkpoint.keep=9"]
        overrides = [*SHORT, *toy, *own, *options_of(name)]
        run(load_config("mini_mtil_dac", [*overrides, f"run_dir={calm}"]))
        if rank == 0:
            shutil.copytree(calm, stopped)
            last = sorted((stopped / "checkpoints").iterdir())[-1]
            for later in (stopped / "adapters" / last.name, *last.glob("step-[!2]")):
                shutil.rmtree(later)
            assert [path.name for path in last.iterdir()] == ["step-2"]
            (stopped / "metrics.json").unlink()
        torch.distributed.barrier()
        run(load_config("mini_mtil_dac", [*overrides, f"run_dir={stopped}"]))
    return found


@pytest.fixture(scope="module")
def runs(run_distributed, shallow_toy: list[str], tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_distributed(run_and_resume, 2, str(folder), shallow_toy, METHODS, timeout_s=1100)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_ends_as_an_undisturbed_one(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    assert_equal(runs[0] / name / "calm", runs[0] / name / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_says_how_far_its_last_task_moved_the_layers(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    told = []
    for part in ("calm", "stopped"):
        folders = sorted((runs[0] / name / part / "adapters").iterdir())
        facts = [json.loads((folder / "adapter.json").read_text())["layers"].values() for folder in folders]
        told.append([[layer.get("drift") for layer in layers] for layers in facts])
    assert told[0] == told[1]
    first, last = told[0][0], told[0][-1]
    kind = method_class(name)
    if len(told[0]) > 1 and kind.inference == "merged" and not issubclass(kind, FullMethod):
        # a booster serves some linears alone, so others may not have moved
        assert set(first) == {None} and all(0 <= drift < 10 for drift in last) and any(last)
    else:
        assert {*first, *last} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_stage_begins_with_the_weights_of_the_past(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    seen = runs[1][name]
    calm = {key.partition(": ")[2]: digests for key, digests in seen.items() if key.startswith("calm")}
    stopped = {key.partition(": ")[2]: digests for key, digests in seen.items() if key.startswith("stopped")}
    assert len(set.union(*map(set, calm.values()))) > 1
    assert {call.split()[0] for call in stopped} == {"prepare", "begin"} and len(stopped) == 2, "one stage is resumed"
    for call, digests in stopped.items():
        assert digests == calm[call] and len(digests) == 1, call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's call of it
@pytest.mark.parametrize("name", METHODS)
def test_every_export_gives_the_runs_model_or_says_why_not(runs, name: str, tmp_path: Path) -> None:
    run = runs[0] / name / "calm"
    finished = sorted((run / "adapters").iterdir())
    config = load_config(run / "config.yaml")
    backbone = library_model(run, make_method(config, load_backbone(config.backbone)).deployed(len(finished)))
    logits = library_logits(backbone)
    if method_class(name).inference != "merged":
        with pytest.raises(InputError, match=f"method={name} needs .* at inference"):
            export_run(run, "open_clip", tmp_path / "open_clip")
        return
    exported = export_run(run, "open_clip", tmp_path / "open_clip")
    model = open_clip.create_model(f"local-dir:{exported}").eval()
    with torch.no_grad():
        image, text = model(images(backbone), backbone.tokenize(PROMPTS_OF_EXPORT))[:2]
        theirs = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-3)
    if issubclass(method_class(name), FullMethod):
        with pytest.raises(InputError, match=f"method={name}"):
            export_run(run, "peft", tmp_path / "peft")
        return
    exported = export_run(run, "peft", tmp_path / "peft", with_base=True)
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(exported / "base"), exported / "all").eval()
    with torch.no_grad():
        found = model(input_ids=backbone.tokenize(PROMPTS_OF_EXPORT), pixel_values=images(backbone))
    torch.testing.assert_close(found.logits_per_image, logits, rtol=1e-4, atol=1e-3)
