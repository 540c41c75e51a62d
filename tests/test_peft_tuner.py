"""DAC as a tuner of PEFT: what it trains, and what PEFT asks of every tuner."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from r1p_dist import attach_pool
from r1p_dist.distributed import rank, world_size
from r1p_dist.errors import InputError
from r1p_dist.peft import R1PCallback, R1PConfig, R1PLinear
from tests import small_llava
from tests.backbones.test_llava import plain_inputs, training_batch
from tests.data.test_peers import folder_of_peers
from tests.test_attached_pool import make_llama, make_llama4
from tests.test_parity import relative

# peft asks transformers by the name of before
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SIZES = {"active": 3, "merged": 2, "alpha": 6.0, "ago_weight": 0.5}
TARGETS = ["q_proj", "v_proj", "down_proj"]
TASKS, STEPS = 2, 2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return make_llama()


def texts(task: int, step: int, count: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 60, (count, 6), generator=torch.Generator().manual_seed(10 * task + step))
    labels = ids.clone()
    labels[:, :2] = -100  # the question; as many answers everywhere, so that means of means are means
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pictures_and_texts(task: int, step: int) -> dict[str, torch.Tensor]:
    return plain_inputs("llava", training_batch(small_llava.make_backbone()))


MODELS: dict[str, tuple[Callable, Callable]] = {
    "language": (make_model, texts),
    "vision and language": (small_llava.make_model, pictures_and_texts),
}


def train(model: nn.Module, tuner: PeftModel, task: int, batches: Callable = texts) -> list[torch.Tensor]:
    """A loop that knows nothing of the method."""
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=0.3)
    tuner.train()
    losses = []
    for step in range(STEPS):
        batch = batches(task, step)
        mine = {name: value.chunk(world_size())[rank()] for name, value in batch.items()}
        loss = model(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def config(**options: Any) -> R1PConfig:
    return R1PConfig(**{"r": 6, **SIZES, "target_modules": TARGETS} | options)


def train_stream(rank_: int, ranks: int) -> dict[str, torch.Tensor]:
    tuner = get_peft_model(make_model(), config(task_type="CAUSAL_LM"))
    model = DistributedDataParallel(tuner) if ranks > 1 else tuner
    losses = train(model, tuner, 0)
    tuner.next_task()
    losses += train(model, tuner, 1)
    counts = torch.stack([pool.activation_counts for pool in tuner.base_model.pools("default")])
    merged = tuner.merge_and_unload().state_dict()
    return {"losses": torch.stack(losses), "counts": counts, **merged}


def by_pool(micro_steps: int = 1) -> dict[str, torch.Tensor]:
    model = make_model()
    pool = attach_pool(model, targets=TARGETS, rank=6, **SIZES)
    losses = []
    for task in range(TASKS):
        pool.begin_task(task)
        optimizer = torch.optim.SGD(pool.parameters(), lr=0.3)
        for step in range(STEPS):
            parts = {name: value.chunk(micro_steps) for name, value in texts(task, step).items()}
            for number in range(micro_steps):
                loss = model(**{name: part[number] for name, part in parts.items()}).loss + pool.penalty()
                (loss / micro_steps).backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        pool.merge()
    counts = torch.stack([adapter.activation_counts for adapter in pool.adapters])
    return {"losses": torch.stack(losses), "counts": counts, **pool.detach().state_dict()}


def assert_same_training(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and torch.equal(found["counts"], expected["counts"])
    before = make_model().state_dict()
    for name in found.keys() - {"counts", "losses"}:
        if any(target in name for target in TARGETS):
            assert relative(found[name] - before[name], expected[name] - before[name]) < 1e-4, name
        else:
            assert torch.equal(found[name], before[name]), name


def test_the_tuner_trains_what_the_pool_trains() -> None:
    found, expected = train_stream(0, 1), by_pool()
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    assert_same_training(found, expected)


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def arguments_of_trainer() -> dict[str, Any]:
    """Four samples a step: two micro steps on one rank, one on each of two."""
    return {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // world_size(), "max_steps": STEPS},
        **{"learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0, "optim": "sgd"},
        **{"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
        "dataloader_pin_memory": False,
    }


def samples_of(task: int) -> list[dict[str, torch.Tensor]]:
    steps = [texts(task, step) for step in range(STEPS)]
    return [{name: batch[name][i] for name in batch} for batch in steps for i in range(4)]


def train_by_trainer(folder: str) -> dict[str, torch.Tensor]:
    """A stream by transformers' Trainer."""
    tuner = get_peft_model(make_model(), config(task_type="CAUSAL_LM"))
    for task in range(TASKS):
        arguments = TrainingArguments(folder, **arguments_of_trainer())
        trainer = InOrder(tuner, arguments, train_dataset=samples_of(task), callbacks=[R1PCallback()])
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (world_size() > 1)
        assert tuner.peft_config["default"].tasks == task + 1
    return tuner.merge_and_unload().state_dict()


def train_both_ways(rank_: int, ranks: int, folder: str) -> list[dict[str, torch.Tensor]]:
    return [train_stream(rank_, ranks), train_by_trainer(folder)]


@pytest.mark.slow
def test_two_ranks_train_what_one_trains_in_a_loop_and_in_a_trainer(run_distributed, tmp_path) -> None:
    expected = by_pool()
    for found, by_trainer in run_distributed(train_both_ways, 2, str(tmp_path)):
        assert_same_training(found, expected)
        assert_same_training({**{name: expected[name] for name in ("counts", "losses")}, **by_trainer}, expected)


def test_a_trainer_with_the_callback_trains_a_stream(tmp_path) -> None:
    found, expected = train_by_trainer(str(tmp_path)), by_pool(micro_steps=2)
    assert_same_training({**found, **{name: expected[name] for name in ("counts", "losses")}}, expected)


def train_by_trl(folder: str, peers: str) -> tuple[PeftModel, list[float]]:
    """A stream by TRL's SFTTrainer, and the losses that it logs."""
    if peers not in sys.path:
        sys.path.append(peers)  # last: other versions of libraries that we have lie there too
    from trl import SFTConfig, SFTTrainer

    class InOrderToo(InOrder, SFTTrainer):
        pass

    own = {"bf16": False, "gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    model, losses = make_model(), []
    for task in range(TASKS):
        samples = [{name: s[name].tolist() for name in ("input_ids", "labels")} for s in samples_of(task)]
        trainer = InOrderToo(
            model,
            SFTConfig(folder, logging_steps=1, **arguments_of_trainer(), **own),
            train_dataset=Dataset.from_list(samples),
            processing_class=small_llava.make_tokenizer(),
            callbacks=[R1PCallback()],
            peft_config=None if task else config(task_type="CAUSAL_LM"),
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model = trainer.model
    return model, losses


def train_by_trl_on_ranks(rank_: int, ranks: int, folder: str, peers: str) -> dict[str, torch.Tensor]:
    warnings.simplefilter("ignore")
    return train_by_trl(folder, peers)[0].merge_and_unload().state_dict()


@pytest.mark.slow
def test_trl_on_two_ranks_trains_what_the_pool_trains(run_distributed, tmp_path) -> None:
    expected = by_pool()
    for found in run_distributed(train_by_trl_on_ranks, 2, str(tmp_path), str(folder_of_peers("peers"))):
        assert_same_training({**{name: expected[name] for name in ("counts", "losses")}, **found}, expected)


@pytest.mark.filterwarnings("ignore")  # of TRL and what it imports
def test_trl_trains_a_stream(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    model, losses = train_by_trl(str(tmp_path), str(folder_of_peers("peers")))
    expected = by_pool(micro_steps=2)
    batch = texts(TASKS - 1, STEPS - 1)
    adapted = model.eval()(**batch).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**batch).logits, adapted, atol=1e-4, rtol=1e-4)
    # of the first task; the term of the second one is no part of what TRL logs
    assert losses[:STEPS] == pytest.approx(expected["losses"].view(TASKS, STEPS, 2)[0].mean(1).tolist(), abs=1e-3)
    found = {**plain.state_dict(), **{name: expected[name] for name in ("counts", "losses")}}
    assert_same_training(found, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_it_merges_saves_and_loads_as_peft_does(kind: str, tmp_path) -> None:
    make, batches = MODELS[kind]
    base, batch = make().eval(), batches(5, 5)
    untouched = base(**batch).logits.detach()
    tuner = get_peft_model(base, config())
    torch.testing.assert_close(tuner.eval()(**batch).logits, untouched)
    train(tuner, tuner, 0, batches)
    tuner.next_task()
    train(tuner, tuner, 1, batches)
    trained = tuner.eval()(**batch).logits.detach()
    assert (trained - untouched).abs().max() > 1e-2
    with tuner.disable_adapter():
        assert torch.equal(tuner(**batch).logits, untouched)
    tuner.merge_adapter()
    torch.testing.assert_close(tuner(**batch).logits, trained, atol=1e-4, rtol=1e-4)
    tuner.unmerge_adapter()
    assert torch.equal(tuner(**batch).logits, trained)

    tuner.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make().eval(), tmp_path, adapter_name="other", is_trainable=True)
    assert again.peft_config["other"].tasks == 1 and torch.equal(again.eval()(**batch).logits, trained)
    for model in (tuner, again):  # the task goes on
        train(model, model, 2, batches)
    further = tuner.eval()(**batch).logits.detach()
    torch.testing.assert_close(again.eval()(**batch).logits, further)
    plain = again.merge_and_unload(safe_merge=True)
    assert [type(m) for m in plain.modules()] == [type(m) for m in make().modules()]
    assert list(plain.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(plain(**batch).logits, further, atol=1e-4, rtol=1e-4)


def test_adapters_come_and_go() -> None:
    batch = texts(3, 3)
    tuner = get_peft_model(make_model().eval(), config())
    untouched = tuner.eval()(**batch).logits.detach()
    train(tuner, tuner, 0)
    first = tuner.eval()(**batch).logits.detach()
    tuner.add_adapter("second", config(r=4, active=2, merged=1, seed=3, router_grad="gated"))
    tuner.set_adapter("second")
    assert torch.equal(tuner(**batch).logits, untouched)
    trained = {name for name, parameter in tuner.named_parameters() if parameter.requires_grad}
    assert trained and all(".second." in name for name in trained)
    assert any("router" in name for name in trained), "gated routers learn"
    train(tuner, tuner, 1)
    tuner.set_adapter("default")
    trained = {name.rpartition(".")[2] for name, p in tuner.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}
    assert torch.equal(tuner.eval()(**batch).logits, first)
    tuner.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="several R1P adapters are active"):
        tuner.train()(**batch)
    with pytest.raises(InputError, match="needs one active adapter"):
        tuner.next_task()
    tuner.base_model.set_adapter("default")
    tuner.delete_adapter("second")
    assert torch.equal(tuner.eval()(**batch).logits, first)
    plain = tuner.unload()
    assert torch.equal(plain.eval()(**batch).logits, untouched)
    assert not any(isinstance(module, R1PLinear) for module in plain.modules())
    plain.train()(**batch)


def test_experts_over_bf16_weights_are_fp32_and_learn() -> None:
    tuner = get_peft_model(make_model().bfloat16(), config())
    before = {name: p.detach().clone() for name, p in tuner.named_parameters() if p.requires_grad}
    assert {value.dtype for value in before.values()} == {torch.float32}
    train(tuner, tuner, 0)
    changed = [name for name, p in tuner.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(changed) == len(before)


def test_a_scaled_loss_is_refused_where_the_ago_term_goes_past_it() -> None:
    def add_log_probs(model: nn.Module, inputs: tuple, output: Any) -> None:
        output.log_probs = output.logits.log_softmax(-1)  # as TRL's trainer does

    model = make_model()
    model.register_forward_hook(add_log_probs)
    tuner = get_peft_model(model, config())
    arguments = TrainingArguments(use_cpu=True, report_to=[])
    R1PCallback().on_train_begin(arguments, None, None, model=tuner)
    tuner.train()(**texts(0, 0))
    arguments.fp16 = True  # by the constructor it needs a GPU
    R1PCallback().on_train_begin(arguments, None, None, model=tuner)
    with pytest.raises(InputError, match="fp16: its loss scaling would not reach the AGO term, .*; use bf16 or fp32"):
        tuner(**texts(0, 1))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="active=9 must not be larger than rank=6"):
        config(active=9)
    with pytest.raises(InputError, match="router_grad='gate': Input should be .*did you mean 'gated'"):
        config(router_grad="gate")
    with pytest.raises(InputError, match="embed_tokens is a Embedding; experts go on torch.nn.Linear alone"):
        get_peft_model(make_model(), config(target_modules=["embed_tokens"]))
    for target, kind in (("experts", "Llama4TextExperts"), ("router", "Llama4Router")):
        with pytest.raises(InputError, match=rf"{target} is a {kind}; experts go on torch.nn.Linear alone"):
            get_peft_model(make_llama4(), config(target_modules=[target]))
    tuner = get_peft_model(make_model(), config())
    with pytest.raises(InputError, match=r"next_task\(\): task 0 made no training step"):
        tuner.next_task()
    train(tuner, tuner, 0)
    tuner.merge_adapter()
    with pytest.raises(InputError, match=r"next_task\(\): the adapter is merged"):
        tuner.next_task()


def test_without_peft_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["r1p_dist", "peft"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'r1p-dist\[peft\]'"):
        import r1p_dist.peft  # noqa: F401
