"""What a frozen image tower says of a picture, kept by the picture: it says the same in every epoch and evaluation."""

from collections.abc import Callable, Sequence

import torch

from r1p_dist.distributed import sum_over_ranks


class FeatureCache:
    """Keeps features in host memory up to a limit; what comes later is computed each time.

    Nothing is dropped for something newer: with every sample once per epoch that would lose what is needed next.
    is_collective: the tower runs on all ranks or on none, because ZeRO-3 gathers its weights.
    """

    def __init__(self, limit_bytes: int, is_collective: bool):
        self.limit_bytes, self.is_collective = limit_bytes, is_collective
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._bytes = 0

    def fetch(
        self,
        pictures: Sequence[tuple[int, int]] | None,
        crops: Sequence[int],
        compute: Callable[[Sequence[int] | None], torch.Tensor],
        device: torch.device,
    ) -> torch.Tensor:
        """Returns the features (all crops, …) of some pictures.

        pictures: (sample, number within it) of each, None where that is not known; crops: how many crops each has.
        compute: numbers of pictures, None for all -> the features of their crops (crops, …).
        """
        if pictures is None or not self.limit_bytes:
            return compute(None)
        missing = [number for number, picture in enumerate(pictures) if picture not in self._kept]
        is_needed = bool(missing)
        if self.is_collective:
            is_needed = bool(sum_over_ranks(torch.tensor([len(missing)], device=device)).item())
        parts = {number: self._kept[pictures[number]] for number in range(len(pictures)) if number not in missing}
        if is_needed:
            numbers = missing or [0]
            computed = compute(numbers).split([crops[number] for number in numbers])
            for number, features in zip(missing, computed, strict=bool(missing)):
                parts[number] = features
                self._keep(pictures[number], features)
        return torch.cat([parts[number].to(device) for number in range(len(pictures))])

    def _keep(self, picture: tuple[int, int], features: torch.Tensor) -> None:
        if picture not in self._kept and self._bytes + features.nbytes <= self.limit_bytes:
            self._kept[picture] = features.detach().to("cpu", copy=True)
            self._bytes += features.nbytes
