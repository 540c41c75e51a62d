"""The training of one stage as a method sees it (protocol/trainer.py), on a DeepSpeed engine at any ZeRO stage."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from r1p_dist.backbones.backbone import Batch
from r1p_dist.checkpoint import TensorFile, write_stored
from r1p_dist.data import TrainLoader
from r1p_dist.distributed import gathered, owner, rank, shaped_from_rank, sum_over_ranks, world_size
from r1p_dist.engine import TaskEngine
from r1p_dist.errors import InputError
from r1p_dist.host_copy import on_device
from r1p_dist.interrupts import StepAgreement
from r1p_dist.optimizer_state import part_of, set_adam_steps
from r1p_dist.protocol import Method, Watcher
from r1p_dist.protocol.trainer import Need
from r1p_dist.protocol.watchers import random_projection
from r1p_dist.step_meter import StepMeter


class TaskTrainer:
    """Implements `Trainer`; see there for what its methods promise."""

    def __init__(
        self,
        method: Method,
        model: TaskEngine,
        agreement: StepAgreement,
        meter: StepMeter,
        scan_loader: Callable[[int | None], TrainLoader],
        past_memory: Sequence[TensorFile],
    ) -> None:
        """scan_loader: makes a loader of so many global batches of the stage's samples, None: an epoch's."""
        self._method, self._model, self._agreement, self._meter = method, model, agreement, meter
        self._scan_loader, self._past_memory = scan_loader, past_memory
        self._parameters = method.trainable_parameters()
        self._further: dict[str, Iterator[list[Batch]]] = {}
        self._loaders: dict[str, TrainLoader] = {}
        self.step_number, self.lr = 0, model.lr
        if method.columns and "nvme" in str(model.engine.config):
            raise InputError(
                f"method={method.config.method} keeps {', '.join(method.columns)}, which cannot go to NVMe"
            )

    def backward(self, batch: Batch) -> None:
        loss, terms = self._method.loss(self._model, batch)
        self._note(loss, terms)
        self._model.backward(loss)

    def gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        # not through the engine: it would expect its own backward
        loss, terms = self._method.loss(self._model.engine.module, batch)
        self._note(loss, terms)
        return self._mean_gradients(loss)

    def _mean_gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        _release_weights(self._model.engine)
        gradients = {}
        for (name, parameter), gradient in zip(self._parameters.items(), found, strict=True):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            gradient = torch.zeros(shape, device=loss.device) if gradient is None else gradient.float()
            gradients[name] = sum_over_ranks(gradient.contiguous()).div_(world_size())
        return gradients

    def backward_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        parameters = self._parameters
        with gathered(parameters.values()):
            terms = [(parameters[name].float() * gradient).sum() for name, gradient in gradients.items()]
            self._model.backward_whole_step(torch.stack(terms).sum())

    def _note(self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> None:
        self._agreement.note(loss, self.step_number + 1)
        self._meter.note(loss, terms)

    def update(self) -> None:
        self.lr = self._model.lr  # the schedule moves on with the step
        self._model.update()
        self._agreement.end_step()

    def edit(self, function: Callable[..., torch.Tensor], *columns: str, only: Collection[str] | None = None) -> None:
        for part in self._parts("value", *columns, only=only):
            part["value"].copy_(function(part["value"], *(part[name] for name in columns)))
        self._write_back("value", only)

    def edit_column(self, column: str, function: Callable[..., torch.Tensor], *columns: str) -> None:
        for part in self._parts(column, "value", *columns):
            further = (part[name] for name in columns)
            part[column].copy_(function(part[column], part["value"], *further))

    def fill_column(self, column: str, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            part = part_of(self._model.engine, parameter, (column,))
            if part is not None:
                part.fill(column, values[name])

    @contextmanager
    def weights(self, column: str) -> Iterator[None]:
        # at stage 0 in fp32 a parameter is the optimizer's own value, which would be lost
        own = [(value, value.clone()) for value in self._shared_values()]
        self._write_back(column)
        try:
            yield
        finally:
            for value, kept in own:
                value.copy_(kept)
            self._write_back("value")

    def restart_moments(self) -> None:
        for part in self._parts("exp_avg", "exp_avg_sq"):
            part["exp_avg"].zero_()
            part["exp_avg_sq"].zero_()
        set_adam_steps(self._model.engine, 0)

    @torch.no_grad()
    def _parts(self, *columns: str, only: Collection[str] | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Yields this rank's parts of each parameter, or of some, by column; none twice."""
        for parameter in self._chosen(only):
            part = part_of(self._model.engine, parameter, columns)
            if part is not None:
                yield part.columns

    def _chosen(self, only: Collection[str] | None) -> list[nn.Parameter]:
        return [parameter for name, parameter in self._parameters.items() if only is None or name in only]

    def _shared_values(self) -> Iterator[torch.Tensor]:
        """Yields the optimizer's values that are the model's own parameters."""
        for parameter in self._parameters.values():
            part = part_of(self._model.engine, parameter, ("value",))
            if part is not None and part.columns["value"].data_ptr() == parameter.data_ptr():
                yield part.columns["value"]

    @torch.no_grad()
    def _write_back(self, column: str, only: Collection[str] | None = None) -> None:
        """Gives the model the numbers of a column, of all ranks' parts; one sum over ranks for each parameter."""
        is_shared = self._model.engine.zero_optimization_stage() > 0
        for parameter in self._chosen(only):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            part = part_of(self._model.engine, parameter, (column,))
            if is_shared:
                whole = torch.zeros(shape.numel(), device=parameter.device)
                if part is not None:
                    own = part.columns[column]
                    whole[part.start : part.start + len(own)] = own.to(whole.device)
                sum_over_ranks(whole)
            else:
                assert part is not None  # every rank keeps all
                whole = part.columns[column]
            if whole.data_ptr() != parameter.data_ptr():
                write_stored(parameter, whole)

    def scan(self, *watchers: Watcher, batches: int | None = None, trained: bool = False) -> None:
        needs: dict[Need, None] = dict.fromkeys(watcher.needs for watcher in watchers)
        for need in needs:
            self._show([watcher for watcher in watchers if watcher.needs == need], need, batches, trained)

    def _show(self, watchers: Sequence[Watcher], need: Need, batches: int | None, trained: bool) -> None:
        """Shows the batches of one pass to watchers that need the same."""
        backbone, loader = self._method.backbone, self._scan_loader(batches)
        with ExitStack() as stack:
            for watcher in watchers:
                stack.enter_context(watcher.watch())
            stack.enter_context(self._quiet(trained or need != "forward"))
            prepare = backbone.preparer(loader.prompts)
            number = 0
            for step in on_device(loader.steps(), prepare, backbone.device):
                backbone.begin_step(step, self._method.config.train)
                for batch in step:
                    for gradients in self._look(batch, need, number):
                        for watcher in watchers:
                            watcher.saw(gradients)
                    number += 1
        loader.check_faults()

    def _look(self, batch: Batch, need: Need, number: int) -> Iterator[dict[str, torch.Tensor] | None]:
        """Runs the model on one micro batch; yields the gradients of its loss without penalties where asked for, or of
        each sample's part."""
        backbone, module = self._method.backbone, self._model.engine.module
        if need == "samples":
            yield from self._gradients_by_sample(batch)
            return
        if need == "sensitivity":
            probe = random_projection(backbone.outputs(module, batch), number)
            torch.autograd.grad(probe, list(self._parameters.values()), allow_unused=True)
            _release_weights(self._model.engine)
            yield None
            return
        with torch.set_grad_enabled(need == "gradients"):
            loss = backbone.loss(module, batch)
        yield self._mean_gradients(loss) if need == "gradients" else None

    def _gradients_by_sample(self, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the gradients of each part of the loss of a micro batch on all ranks."""
        place, count = 0, 1
        while place < count:
            # forwards each time: ZeRO-3 gathers weights for one backward of a forward
            losses = self._method.backbone.sample_losses(self._model.engine.module, batch)
            count = world_size() * len(losses)
            number, owner_of_it = divmod(place, world_size())
            own = torch.zeros_like(losses)
            own[number] = world_size() * (rank() == owner_of_it)  # the mean over ranks is that sample's part
            yield self._mean_gradients((own * losses).sum())
            place += 1

    @contextmanager
    def _quiet(self, trained: bool) -> Iterator[None]:
        """Runs the model without dropout, votes and counts; trained: with what is in training beside the weights."""
        backbone, adapters = self._method.backbone, self._method.adapters
        rates = [adapter.dropout for adapter in adapters]
        was_training = backbone.training
        backbone.train(trained)
        for adapter in adapters:
            adapter.dropout, adapter.is_recorded = 0.0, True
        try:
            yield
        finally:
            for adapter, rate in zip(adapters, rates, strict=True):
                adapter.dropout, adapter.is_recorded = rate, None
            backbone.train(was_training)

    def add_stream(self, name: str, loader: TrainLoader) -> None:
        """Makes a further stream's batches available to `next_batches`."""
        backbone, self._loaders[name] = self._method.backbone, loader
        self._further[name] = on_device(loader.steps(), backbone.preparer(loader.prompts), backbone.device)

    def cursors(self) -> dict[str, dict]:
        """Returns where each further stream stands."""
        return {name: loader.cursor(self.step_number) for name, loader in self._loaders.items()}

    def next_batches(self, request: str) -> Sequence[Batch]:
        batches = next(self._further[request])
        self._method.backbone.begin_step(batches, self._method.config.train)
        return batches

    def past_memory(self) -> Sequence[Mapping[str, torch.Tensor]]:
        return self._past_memory

    def by_layer(self, layers: Iterable[str], compute: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for number, layer in enumerate(layers):
            own = compute(layer) if rank() == owner(number) else None
            found[layer] = shaped_from_rank(own, owner(number), self._method.backbone.device)
        return found


def _release_weights(engine: Any) -> None:
    """Lets ZeRO-3 take the weights away again that it believes in use, as it does at the end of its own backward."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.parameter_offload.get_param_coordinator().release_and_reset_all(engine.module)
