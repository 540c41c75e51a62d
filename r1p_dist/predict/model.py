"""The model of a run before it and after it, in one copy of the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from r1p_dist.adapters import Update
from r1p_dist.backbones import Placement, load_backbone, weights_identity
from r1p_dist.checkpoint import load_updates
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.export.finished_run import check_base, finished_folders
from r1p_dist.methods import INFERENCE_NEEDS, make_method
from r1p_dist.precision import precision_type
from r1p_dist.predict.part import Predictor, PredictPart
from r1p_dist.predict.request import Request
from r1p_dist.predict.source import Source
from r1p_dist.recipes import load_config
from r1p_dist.run_files import CONFIG_FILE, UPDATES_FILE

BEFORE, AFTER = "before", "after"  # the pristine model, and that with what the finished tasks merged


class PredictingModel:
    """Loads a source's model, on the accelerator where there is one, in the precision that its run would have here.

    InputError: weights that cannot be had or are others than the run's, no finished task, or a method whose model
    merged weights alone do not make.
    """

    def __init__(self, source: Source):
        self.source = source
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        placement = Placement(device or torch.device("cpu"), precision_type(source.precision))
        # the run's cache is of the pristine tower; it and the attention's kernels are of the machine of the run
        own = {"feature_cache_gb": 0.0, "feature_cache_dir": None, "attn_implementation": None}
        self.backbone = load_backbone(source.backbone.model_copy(update=own), placement)
        self._updates: dict[str, Sequence[Mapping[str, Update]]] = {AFTER: ()}
        if source.run is not None:
            self._open_run(load_config(source.folder / CONFIG_FILE))
        self.backbone.eval()
        self._encoder = self.backbone.encoder(source.data)
        self._request: Request | None = None
        self._predictors: dict[str, Predictor] = {}
        self._state = AFTER if source.run is None else BEFORE

    def _open_run(self, config: RunConfig) -> None:
        folder = self.source.folder
        check_base(folder, config.backbone, weights_identity(config.backbone, self.backbone))
        self._method = method = make_method(config, self.backbone)
        if method.inference != "merged":
            raise InputError(
                f"{folder}: method={config.method} needs {INFERENCE_NEEDS[method.inference]} at inference, beside what "
                "the run keeps of its tasks; how well it did is in its metrics.json"
            )
        finished = finished_folders(folder)
        if method.trains and not finished:
            raise InputError(f"{folder}/adapters: no finished task; predict after the run's first")
        places, files = method.update_places(), [path / UPDATES_FILE for path in finished.values()]
        deployed = [files[index] for index in method.deployed(len(files))]
        self._updates = {BEFORE: (), AFTER: [load_updates(file, places, self.backbone.device) for file in deployed]}

    def encode(self, request: Request, picture: Image.Image) -> dict[str, Any]:
        """Returns what `predict` takes of a picture. BadSampleError: the question is too long for the model."""
        return self._encoder.evaluate(request.sample(picture))

    @torch.no_grad()
    def predict(self, request: Request, examples: Sequence[dict[str, Any]]) -> list[dict[str, list[float] | str]]:
        """Returns for each picture, by BEFORE (of a run alone) and AFTER, what the request's predictor says of it."""
        if request != self._request:
            part: PredictPart = self.source.kind.part("predict")
            config = self.source.evaluation
            self._predictors = {state: part.predictor(config, self.backbone, request) for state in self._updates}
            self._request = request
        batch = {name: tensor.to(self.backbone.device) for name, tensor in self._encoder.collate(examples).items()}
        found = {}
        # what the weights are already goes first
        for state in sorted(self._updates, key=lambda state: state != self._state):
            self._become(state)
            found[state] = self._predictors[state](batch)
        return [{state: found[state][index] for state in self._updates} for index in range(len(examples))]

    def _become(self, state: str) -> None:
        if state != self._state:
            self._updates[state] = self._method.set_merged(self._updates[state])
            self._state = state
