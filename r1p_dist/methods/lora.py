"""Plain LoRA on the stream: kept going from task to task, merged and begun anew, or on all tasks jointly."""

from r1p_dist.adapters import Factors, LoRALinear, Routing
from r1p_dist.backbones import Slot
from r1p_dist.data import Stream
from r1p_dist.methods.method import Method, Stage


class Lora(Method):
    """Sequential LoRA: one adapter kept going, or with `lora.restart` merged after each task and begun anew."""

    sections = ("train", "targets", "lora")
    adapters: list[LoRALinear]

    def attach(self) -> list[LoRALinear]:
        lora, targets = self.config.lora, self.config.targets

        def make(slot: Slot, routing: Routing) -> LoRALinear:
            return LoRALinear(slot.linear, lora.rank, lora.alpha, lora.dropout, rows=slot.rows)

        return self.backbone.attach(make, targets.towers, targets.layers)

    def begin_task(self, index: int) -> None:
        for i, adapter in enumerate(self.adapters):
            if index == 0 or self.config.lora.restart:
                adapter.reset(self.generator(index, i))
            else:
                adapter.unmerge_all()  # the adapter itself still holds what was learnt

    def merged_tasks(self, index: int) -> list[int]:
        return super().merged_tasks(index) if self.config.lora.restart else []

    def deployed_tasks(self, count: int) -> list[int]:
        return super().deployed_tasks(count) if self.config.lora.restart else list(range(count))[-1:]

    def unmerged_updates(self) -> list[list[Factors]]:
        return [[*adapter.merged, adapter.update()] for adapter in self.adapters]

    def end_task(self) -> None:
        for adapter in self.adapters:
            adapter.merge_update(adapter.update())


class Joint(Lora):
    """Joint LoRA: all tasks at once, with as many iterations as they have together; the usual upper bound."""

    def stages(self, stream: Stream) -> list[Stage]:
        iterations = sum(stage.iterations for stage in super().stages(stream))
        return [Stage("joint", stream.tasks, iterations)]
