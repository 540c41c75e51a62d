"""The story of a run: for each task fit, merge, evaluate on all tasks, save."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import deepspeed
import open_clip
import torch

from r1p_dist.backbones import load_backbone
from r1p_dist.checkpoint import save_adapter
from r1p_dist.config import RunConfig
from r1p_dist.data import Stream, Task, TrainLoader, evaluation_loaders, train_loader
from r1p_dist.distributed import CollectiveCounter, rank, sum_over_ranks, world_size
from r1p_dist.engine import TaskEngine, choose_precision, resolve_deepspeed, start_process_group
from r1p_dist.errors import InputError
from r1p_dist.evaluation.classify import Classifier
from r1p_dist.evaluation.metrics import continual_metrics
from r1p_dist.methods import Method, Stage, make_method
from r1p_dist.report import write_report
from r1p_dist.runlog import RunLog


def run(config: RunConfig) -> dict:
    """Trains the stream of a configuration and returns its metrics, as in metrics.json. Raises InputError before any
    training."""
    started = time.perf_counter()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = start_process_group()
    torch.manual_seed(config.seed * world_size() + rank())  # dropout differs between ranks
    stream = Stream.load(config.stream, config.order, config.tasks)
    stream.check_names(config.train.per_task, "train.per_task")
    backbone = load_backbone(config.backbone).to(device)
    method = make_method(config, backbone)
    stages = method.stages(stream)
    zero_stage = resolve_deepspeed(config, world_size())["zero_optimization"]["stage"]
    reference = Stream.load(config.data.reference).tasks if config.data.reference else ()
    loaders = [
        train_loader(
            config, stage.tasks, stage.iterations, backbone.preprocess, past=_tasks(stages[:index]), reference=reference
        )
        for index, stage in enumerate(stages)
    ]
    test_loaders = evaluation_loaders(config, stream.tasks, backbone.preprocess)
    classifier = Classifier(backbone, test_loaders, config.evaluation.batch_size)
    log = RunLog(config.run_dir, config.dump(), config.log.tensorboard)
    precision, reason = choose_precision(config)
    log.say(f"{config.method} on {stream.name}: {len(stream.tasks)} tasks, {world_size()} ranks, ZeRO {zero_stage}")
    log.say(f"precision {precision}: {reason}")

    rows: list[list[float]] = []
    left_out: list[int] = []
    before_merge: list[float | None] = [None] * len(stream.tasks)
    collectives: dict[str, dict[str, int]] = {}
    for index, (stage, loader) in enumerate(zip(stages, loaders, strict=True)):
        method.begin_task(index)
        train = config.train.for_task(stage.name).model_copy(update={"iterations": stage.iterations})
        model = TaskEngine(backbone, config, train, world_size()) if method.adapters else backbone
        if index == 0:
            row, left_out = evaluate(classifier, model, stream, 0, log)
            rows.append(row)
        if method.adapters:
            collectives = fit(model, method, stage, loader, config, log)
            for adapter, updates in zip(method.adapters, method.unmerged_updates(), strict=True):
                adapter.set_weight(updates)
            for result in classifier.evaluate(model, stage.tasks):
                before_merge[[task.name for task in stream.tasks].index(result.task)] = result.accuracy
            method.end_task()
            rows.append(evaluate(classifier, model, stream, index + 1, log)[0])
            model.close()
            if rank() == 0:
                facts = {
                    "task": stage.name,
                    "method": config.method,
                    "backbone": config.backbone.name,
                    "seed": config.seed,
                }
                save_adapter(config.run_dir / "adapters" / f"{index:02d}-{stage.name}", method.adapters, facts)
        else:
            rows.append(rows[0])
        metrics = {
            "tasks": [task.name for task in stream.tasks],
            "metric": ["accuracy"] * len(stream.tasks),
            "domains": [task.domain for task in stream.tasks],
            "accuracy": rows,
            "before_merge": before_merge,
            **continual_metrics(rows + [None] * (len(stages) + 1 - len(rows))),
            "trainable_parameters": method.count_parameters(),
            "world_size": world_size(),
            "zero_stage": zero_stage,
            "collectives_per_step": collectives,
            "bad_samples": {"train": [loader.bad_samples for loader in loaders[: index + 1]], "evaluation": left_out},
            "method": config.method,
            "seed": config.seed,
            "versions": {module.__name__: module.__version__ for module in (torch, deepspeed, open_clip)},
            "wall_seconds": round(time.perf_counter() - started, 1),
        }
        log.metrics(metrics)
        log.say(summary(index, stage, stages, metrics))
    if rank() == 0:
        write_report(config.run_dir)
    return metrics


def fit(model: TaskEngine, method: Method, stage: Stage, loader: TrainLoader, config: RunConfig, log: RunLog) -> dict:
    """Trains one stage, the loop over micro batches, for every method and backbone; returns a step's collectives."""
    method.backbone.set_prompts(loader.prompts)
    method.backbone.train()
    log.begin_stage(stage.name, stage.iterations)
    step, sums, waited, since = 0, torch.zeros(3), 0.0, time.perf_counter()
    batches, micro_batches, collectives = iter(loader), 0, CollectiveCounter()
    while step < stage.iterations:
        asked = time.perf_counter()
        batch = {name: tensor.to(method.backbone.device) for name, tensor in next(batches).items()}
        waited += time.perf_counter() - asked
        lr = model.lr
        with collectives if step == 1 else nullcontext():  # the second step stands for all: lagged votes run by then
            loss, parts = method.loss(model, batch)
            is_boundary = model.step(loss)
            if is_boundary:
                method.end_step()
        sums[0] += loss.detach().cpu()
        sums[1] += parts["ago"].detach().cpu() if "ago" in parts else 0
        micro_batches += 1
        if not is_boundary:
            continue
        step += 1
        if step % config.log.every_steps == 0 or step == stage.iterations:
            seconds = time.perf_counter() - since
            sums[2] = loader.count_new_faults()
            loss_mean, ago_mean, faults = (sum_over_ranks(sums) / (micro_batches * world_size())).tolist()
            if faults:
                loader.check_faults()
            samples = micro_batches * config.train.global_batch_size / config.train.gradient_accumulation_steps
            values = {"loss": loss_mean, "ago": ago_mean, "lr": lr}
            values |= {"samples_per_second": round(samples / seconds, 2), "data_wait": round(waited / seconds, 4)}
            log.step(stage.name, step, values)
            if loss_mean != loss_mean or abs(loss_mean) == float("inf"):
                raise InputError(
                    f"task {stage.name} step {step}: the loss is {loss_mean}; try a smaller train.lr than {lr}"
                )
            sums, micro_batches, waited, since = torch.zeros(3), 0, 0.0, time.perf_counter()
    log.end_stage()
    return collectives.summary()


def evaluate(
    classifier: Classifier, model: Callable, stream: Stream, row: int, log: RunLog
) -> tuple[list[float], list[int]]:
    """Returns one row of the accuracy matrix, and how many pictures of each task could not be decoded."""
    results = classifier.evaluate(model, stream.tasks)
    for result in results:
        log.correct(row, result.task, result.correct.tolist())
    return [result.accuracy for result in results], [result.left_out for result in results]


def _tasks(stages: Sequence[Stage]) -> list[Task]:
    return [task for stage in stages for task in stage.tasks]


def summary(index: int, stage: Stage, stages: Sequence[Stage], metrics: dict) -> str:
    zero_shot, row = metrics["accuracy"][0], metrics["accuracy"][-1]
    mean = sum(row) / len(row)
    own = ""
    if len(stage.tasks) == 1 and metrics["before_merge"][index] is not None:
        own = f"own task {zero_shot[index]:.1f} -> {metrics['before_merge'][index]:.1f} -> merged {row[index]:.1f}, "
    everything = f"all tasks {mean:.2f} (zero-shot {sum(zero_shot) / len(row):.2f})"
    return f"[{index + 1}/{len(stages)}] {stage.name}: {own}{everything}"
