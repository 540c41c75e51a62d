"""What the loss of the steps since the last logged one came to, summed on the device: the host waits for none."""

from collections.abc import Mapping, Sequence

import torch

from r1p_dist.distributed import rank, sum_over_ranks, world_size


class StepMeter:
    """Sums of the loss and its terms over micro batches; one that is not finite is left out.

    names: of the terms, known from the first micro batch on, or from a checkpoint.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = ()) -> None:
        self._device, self.names = device, list(names)
        self._sums = self._zeros()

    def _zeros(self) -> torch.Tensor:
        """Micro batches, loss, terms."""
        return torch.zeros(2 + len(self.names), dtype=torch.float64, device=self._device)

    def note(self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor]) -> None:
        """Adds one micro batch; the terms of a stage have the same names in each."""
        if not self.names:
            self.names = list(terms)
            self._sums = self._zeros()
        numbers = torch.stack([torch.ones_like(loss), loss.detach(), *(terms[name].detach() for name in self.names)])
        self._sums += numbers.double().where(numbers[1].isfinite(), 0)

    def read(self, faults: int) -> tuple[dict[str, float], int]:
        """Returns the means over ranks and micro batches and the sum of faults, and begins again; a collective.

        `loss`, and where it has several terms `loss_NAME` for each.
        """
        sums = sum_over_ranks(torch.cat([self._sums.cpu(), torch.tensor([faults], dtype=torch.float64)])).tolist()
        self._sums = self._zeros()
        count, loss, *terms, faults = sums
        means = {"loss": loss / max(count, 1)}
        if len(terms) > 1:
            means |= {f"loss_{name}": term / max(count, 1) for name, term in zip(self.names, terms, strict=True)}
        return means, int(faults)

    def to_bytes(self) -> torch.Tensor:
        """Returns the sums, uint8, as many on every rank."""
        return self._sums.cpu().view(torch.uint8)

    def restore(self, ranks: torch.Tensor) -> None:
        """Takes what each rank's `to_bytes` gave (ranks, bytes); another number of ranks goes on with the whole sum."""
        sums = ranks.contiguous().view(torch.float64)
        own = sums[rank()] if len(sums) == world_size() else sums.sum(0) * (rank() == 0)
        self._sums = own.to(self._device).clone()
