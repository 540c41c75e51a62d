"""The penalty of Steady against the layers' outputs on past inputs themselves, its coordinates, weights of tokens."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1p_dist.errors import InputError
from r1p_dist.methods.steady import MetricLinear
from r1p_dist.moments.file import write_moments
from r1p_dist.moments.sketch import Sketch
from r1p_dist.moments.whitening import Whitening
from r1p_dist.protocol import InputMoments
from tests.methods.anchors import noise_moments

PLAIN = ["options.batches=1", "options.outer_ridge=null", "options.ridge=0.01"]


def inputs_of(backbone, layer: torch.nn.Module, batches: list[dict], tower: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the inputs (tokens, in) of a module over batches with the merged weights, and how often each counts."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    times = []
    backbone.eval()
    with torch.no_grad():
        for batch in batches:
            if tower == "image":
                backbone(image=batch["image"])
                times.append(torch.ones(seen[-1].shape[:2]))
            else:
                backbone(tokens=batch["tokens"], end=batch["end"])
                real = torch.arange(seen[-1].shape[1]) <= batch["end"][:, None]
                times.append((real * batch["counts"][:, None]).float())
    handle.remove()
    flat = [value.flatten(0, 1) for value in seen]
    return torch.cat(flat), torch.cat([value.flatten() for value in times])


def known_moment(adapter) -> torch.Tensor:
    """Returns the moment C that an adapter's R is the root of."""
    whitening = adapter.whitening
    R = whitening.times(torch.eye(adapter.in_features)).double()
    return (whitening.span * torch.linalg.inv(R @ R) - whitening.ridge * torch.eye(adapter.in_features)).float()


def norm_before(backbone, tower: str) -> torch.nn.Module:
    """Returns the LayerNorm whose output the tower's first attention reads."""
    model = backbone.model.visual if tower == "image" else backbone.model.text
    return model.transformer.resblocks[0].ln_1


def gradient_of(memory: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Returns the moment of gradients that a stage left of a layer, (out, out), of a mean eigenvalue of one."""
    factor = memory[f"{name}.gradient.factor"]
    G = factor @ factor.T + memory[f"{name}.gradient.rest"] * torch.eye(len(factor))
    return G * len(G) / G.trace()


def root(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """Returns c (C / mean + ridge)^(-1/2) with tr(R C R) = tr(C), in double precision."""
    values, vectors = torch.linalg.eigh(moment.double())
    R = vectors @ torch.diag((values / values.mean() + ridge) ** -0.5) @ vectors.T
    return R * (moment.double().trace() / (R @ moment.double() @ R).trace()).sqrt()


@pytest.mark.parametrize("outer_ridge", ["null", "0.1"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_penalty_is_the_share_of_past_outputs_that_an_update_changes(
    stages_of, tower: str, outer_ridge: str
) -> None:
    own = ["options.batches=2", "options.weight=7", f"options.outer_ridge={outer_ridge}"]
    stages, train = stages_of("steady", "options.by_sensitivity=false", *own)
    method, backbone = stages.method, stages.method.backbone
    stages.begin(0)
    assert "loss_inputs" not in train(0)
    stages.end()
    x, times = inputs_of(backbone, norm_before(backbone, tower), stages.scan_batches(0, 2), tower)
    stages.begin(1)
    (adapter,) = [adapter for adapter in method.adapters if adapter.name == f"{tower}.0.k"]
    with torch.no_grad():
        for other in method.adapters:
            other.B.zero_()
        adapter.B.normal_(generator=torch.Generator().manual_seed(0))
    update = adapter.update()
    # as the model's output depends on the layer's
    G = torch.eye(len(update.B)) if outer_ridge == "null" else gradient_of(stages.memory[0], adapter.name)
    changes, outputs = x @ (update.scaling * update.B @ update.A).T, x @ adapter.linear.weight[adapter.rows].T
    changed, whole = (((y @ G) * y).sum(1) @ times / times.sum() for y in (changes, outputs))
    backbone.train()
    _, terms = method.loss(backbone, stages.scan_batches(1, 1)[0])
    expected = 7 * changed / whole / len(method.adapters)
    torch.testing.assert_close(terms["inputs"], expected.detach(), rtol=1e-4, atol=0)
    stages.engine.close()


def test_what_trains_is_seen_through_the_roots_of_the_moments(stages_of) -> None:
    stages, train = stages_of("steady", "options.batches=1", "options.ridge=0.1", "options.outer_ridge=0.2")
    stages.begin(0)
    adapter = stages.method.adapters[0]
    assert torch.equal(adapter.update().A, adapter.A.detach())
    train(0)
    stages.end()
    stages.begin(1)
    R = root(stages.memory[0][f"{adapter.name}.moment"], 0.1)
    torch.testing.assert_close(adapter.update().A.double(), adapter.A.detach().double() @ R, rtol=1e-3, atol=1e-5)
    before = adapter.A.detach().clone()
    train(1)
    assert not torch.equal(before, adapter.A) and adapter.B.any()
    L = root(gradient_of(stages.memory[0], adapter.name), 0.2)
    torch.testing.assert_close(adapter.update().B.double(), L @ adapter.B.detach().double(), rtol=1e-3, atol=1e-5)
    x = torch.randn(2, 3, adapter.in_features)
    adapter.train()
    update, W = adapter.update(), adapter.linear.weight[adapter.rows].detach()
    expected = x @ (W + update.scaling * update.B @ update.A).T
    (factors,) = type(adapter).factors([adapter], x, None)
    torch.testing.assert_close(x @ (W + factors.scaling * factors.B @ factors.A).T, expected)
    stages.engine.close()


def test_half_precision_rounds_none_of_the_penalty_away() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) * torch.logspace(1, -3, 32)
    C = x.T @ x / 200
    adapter = MetricLinear(torch.nn.Linear(32, 16, dtype=torch.bfloat16), 4)
    y = torch.randn(200, 16, generator=generator) * torch.logspace(1, -3, 16)
    G = y.T @ y / 200
    adapter.whitening, adapter.outer, adapter.scale = Whitening.of(C, 0.01), Whitening.of(G, 0.01), 1.0
    with torch.no_grad():
        adapter.A.zero_()
        adapter.A[:, 24:].normal_(generator=generator)  # where past inputs have next to nothing
        adapter.B.normal_(generator=generator)
    (factors,) = MetricLinear.factors([adapter], x.bfloat16(), None)
    assert factors.A.dtype == torch.bfloat16
    A, B, _, _ = adapter.update()
    expected = adapter.scaling**2 * ((A @ C @ A.T) * (B.T @ G @ B)).sum()
    torch.testing.assert_close(adapter.penalty(factors)["inputs"], expected, rtol=1e-2, atol=0)


def test_past_tasks_count_alike_and_their_gradients_whatever_their_size(stages_of) -> None:
    stages, train = stages_of("steady", "options.batches=1", "options.outer_ridge=0.1")
    for task in range(2):
        stages.begin(task)
        train(task)
        stages.end()
    adapter = stages.method.adapters[0]
    one, other = (memory[f"{adapter.name}.moment"] for memory in stages.memory)
    assert (one - other).norm() > 0
    stages.begin(2)
    torch.testing.assert_close(known_moment(adapter), (one + other) / 2, rtol=1e-3, atol=1e-4 * float(one.trace()))
    L = root(sum(gradient_of(memory, adapter.name) for memory in stages.memory), 0.1)
    torch.testing.assert_close(adapter.outer.times(torch.eye(len(L))).double(), L, rtol=1e-3, atol=1e-4)
    stages.engine.close()


def test_tasks_of_a_run_without_gradients_are_refused_with_the_remedy(stages_of) -> None:
    stages, _ = stages_of("steady", *PLAIN)
    stages.begin(0)
    stages.end()
    stages.method.options = stages.method.options.model_copy(update={"outer_ridge": 0.1})
    with pytest.raises(InputError, match="options.outer_ridge=0.1: an earlier task left no moments of gradients"):
        stages.begin(1)
    stages.engine.close()


def test_the_output_side_without_an_anchor_is_warned_of(stages_of, caplog) -> None:
    for outer_ridge, warns in (("null", False), ("0.1", True)):
        stages, _ = stages_of("steady", f"options.outer_ridge={outer_ridge}")
        stages.method.stages(SimpleNamespace(tasks=()))
        assert ("options.outer_ridge without an anchor" in caplog.text) == warns


WIDE = ["options.sketch_above=40", "options.sketch=6"]


def test_wide_inputs_are_held_by_a_sketch(stages_of) -> None:
    stages, train = stages_of("steady", *PLAIN, *WIDE)
    whole, train_whole = stages_of("steady", *PLAIN)
    for run, train_one in ((stages, train), (whole, train_whole)):
        for task in range(2):
            run.begin(task)
            train_one(task)
            run.end()
        run.begin(2)
    full = {adapter.name: known_moment(adapter) for adapter in whole.method.adapters}
    wide = [name for name in full if len(full[name]) > 40]
    assert 0 < len(wide) < len(full)
    for adapter in stages.method.adapters:
        width, matrix = adapter.in_features, adapter.whitening.matrix
        assert matrix.shape == (width, 6 if adapter.name in wide else width) and adapter.outer is None
        torch.testing.assert_close(known_moment(adapter).trace(), full[adapter.name].trace(), rtol=0.05, atol=0)
    for run in (stages, whole):
        run.engine.close()


@pytest.mark.parametrize("keep", [1000, 4])
def test_an_anchor_counts_as_past_tasks_from_the_first_one_on(stages_of, tmp_path: Path, keep: int) -> None:
    file = tmp_path / "anchor"
    own = ["options.anchor_tasks=3", "options.batches=1", "options.outer_ridge=0.1"]
    stages, train = stages_of("steady", f"options.anchor={file}", *own)
    method = stages.method
    anchor = noise_moments(method)
    write_moments(file, keep=keep, **anchor)
    stream = SimpleNamespace(tasks=())
    method.stages(stream)
    stages.begin(0)
    assert "loss_inputs" in train(0)
    adapter = method.adapters[0]
    C, G = (Sketch.of(moments[adapter.name], keep).whole() for moments in (anchor["moments"], anchor["gradients"]))
    size = float(C.trace())
    torch.testing.assert_close(known_moment(adapter), C, rtol=0, atol=1e-3 * size)
    assert adapter.outer.matrix.shape == (len(G), len(G))
    torch.testing.assert_close(adapter.outer.times(torch.eye(len(G))).double(), root(G, 0.1), rtol=1e-2, atol=1e-2)
    stages.end()
    stages.begin(1)
    expected = (3 * C + stages.memory[0][f"{adapter.name}.moment"]) / 4
    torch.testing.assert_close(known_moment(adapter), expected, rtol=0, atol=1e-3 * size)
    L = root((3 * G * len(G) / G.trace() + gradient_of(stages.memory[0], adapter.name)) / 4, 0.1)
    torch.testing.assert_close(adapter.outer.times(torch.eye(len(G))).double(), L, rtol=1e-2, atol=1e-2)
    stages.engine.close()
    # named on every rank before any engine is made, not by the one alone that owns the layer
    identity, layers = anchor["facts"]["backbone"], dict(anchor["layers"])
    lacking, _ = layers.popitem()
    for other, words in (
        ({"facts": {"backbone": identity | {"sha256": "0"}, "source": "noise"}}, "measured on other weights"),
        ({"gradients": {}}, "has no moment of the gradients at image.0.q's output"),
        ({"layers": layers}, f"has no moment of {lacking}'s input"),
    ):
        write_moments(file, keep=keep, **anchor | other)
        with pytest.raises(InputError, match=f"anchor: {words}"):
            method.stages(stream)


def test_tokens_that_the_features_do_not_depend_on_have_no_weight(stages_of) -> None:
    stages, _ = stages_of("steady")
    method, backbone = stages.method, stages.method.backbone
    trainer = stages.begin(0)
    batch = stages.scan_batches(0, 1)[0]
    inputs = InputMoments(backbone, method.adapters, by_sensitivity=True, with_gradients=True)
    trainer.scan(inputs, batches=1, trained=True)
    # of the image tower's last block, behind attention, the features read [CLS] alone
    last = len(backbone.model.visual.transformer.resblocks) - 1
    block = backbone.model.visual.transformer.resblocks[last]
    seen = []
    handle = block.ln_2.register_forward_hook(lambda module, args, output: seen.append(output.detach()[:, 0]))
    backbone.eval()
    with torch.no_grad():
        backbone(image=batch["image"])
    handle.remove()
    # and of these, by the squared gradient of a projection of the feature
    weights = []
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0))
    outputs: list[torch.Tensor] = []
    handle = block.mlp.c_fc.register_forward_hook(
        lambda module, args, output: outputs.append(output.requires_grad_(True))
    )
    backbone.train()
    features = backbone(image=batch["image"])[0]
    handle.remove()
    (gradient,) = torch.autograd.grad((features @ direction).sum(), outputs)
    weights = gradient[:, 0].square().sum(-1)
    x = seen[0]
    expected = (x * weights[:, None]).T @ x / weights.sum()
    torch.testing.assert_close(inputs.moments[f"image.{last}.fc1"], expected, rtol=1e-3, atol=1e-5)
    g = gradient[:, 0]
    torch.testing.assert_close(inputs.gradients[f"image.{last}.fc1"], g.T @ g, rtol=1e-3, atol=1e-7)
    stages.engine.close()
