"""What a frozen image tower says of a picture, kept by the picture: it says the same in every epoch and evaluation."""

from collections.abc import Callable, Sequence

import torch

from r1p_dist.distributed import sum_over_ranks
from r1p_dist.kinds.llava.feature_files import FeatureFiles


class FeatureCache:
    """Keeps features in host memory up to a limit, and in files that ranks and runs share; else they are computed.

    Nothing is dropped for something newer: with every sample once per epoch that would lose what is needed next.
    is_collective: the tower runs on all ranks or on none, because ZeRO-3 gathers its weights.
    """

    def __init__(self, limit_bytes: int, is_collective: bool, files: FeatureFiles | None = None):
        self.limit_bytes, self.is_collective, self.files = limit_bytes, is_collective, files
        self._kept: dict[str, torch.Tensor] = {}
        self._bytes = 0

    @property
    def keeps(self) -> bool:
        return bool(self.limit_bytes) or self.files is not None

    def fetch(
        self,
        pictures: Sequence[str] | None,
        crops: Sequence[int],
        compute: Callable[[Sequence[int] | None], torch.Tensor],
        device: torch.device,
    ) -> torch.Tensor:
        """Returns the features (all crops, …) of some pictures.

        pictures: the name of each, of what it shows; None where that is not known; crops: how many crops each has.
        compute: numbers of pictures, None for all -> the features of their crops (crops, …).
        """
        if pictures is None or not self.keeps:
            return compute(None)
        parts = {number: kept for number, name in enumerate(pictures) if (kept := self._find(name)) is not None}
        missing = [number for number in range(len(pictures)) if number not in parts]
        is_needed = bool(missing)
        if self.is_collective:
            is_needed = bool(sum_over_ranks(torch.tensor([len(missing)], device=device)).item())
        if is_needed:
            numbers = missing or [0]
            computed = compute(numbers).split([crops[number] for number in numbers])
            for number, features in zip(missing, computed, strict=bool(missing)):
                parts[number] = features
                self._keep(pictures[number], features)
        return torch.cat([parts[number].to(device) for number in range(len(pictures))])

    def _find(self, name: str) -> torch.Tensor | None:
        found = self._kept.get(name)
        if found is None and self.files is not None and (found := self.files.read(name)) is not None:
            self._keep_in_memory(name, found)
        return found

    def _keep(self, name: str, features: torch.Tensor) -> None:
        if name in self._kept:
            return  # twice in one batch
        features = features.detach().to("cpu", copy=True)
        self._keep_in_memory(name, features)
        if self.files is not None:
            self.files.write(name, features)

    def _keep_in_memory(self, name: str, features: torch.Tensor) -> None:
        if self._bytes + features.nbytes <= self.limit_bytes:
            self._kept[name] = features
            self._bytes += features.nbytes
