"""LoDA's rows and its merge against the formulae written out; what trains when (arXiv 2603.00191)."""

import pytest
import torch

from r1p_dist.methods.loda import designed_rows, isolation_columns, kept_shares


def moment(seed: int, size: int = 8) -> torch.Tensor:
    x = torch.randn(5 * size, size, generator=torch.Generator().manual_seed(seed)) * torch.linspace(1, 3, size)
    x = x.roll(2 * seed, dims=1)
    return x.T @ x / len(x)


def test_general_rows_lead_the_summed_moments_and_isolation_rows_the_ratio() -> None:
    current, past = moment(1), moment(2)
    rows = designed_rows(current, past, 3, 1e-9)
    general, isolated = 3**0.5 * rows[:3], 3**0.5 * rows[3:]
    top = torch.linalg.svd(current + past)[0][:, :3]
    torch.testing.assert_close((general @ top).abs(), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(isolated @ isolated.T, torch.eye(3), atol=1e-5, rtol=0)
    # of all subspaces of three dimensions, by the eigenvalues of past^-1 current
    values, vectors = torch.linalg.eig(torch.linalg.inv(past) @ current)
    best = vectors.real[:, values.real.argsort(descending=True)[:3]]
    best = torch.linalg.qr(best)[0]
    torch.testing.assert_close(isolated.T @ isolated, best @ best.T, atol=1e-3, rtol=0)
    ratio = lambda x: float(x @ current @ x / (x @ past @ x))  # noqa: E731
    first = isolation_columns(current, past, 1, 1e-9)[:, 0].float()
    assert ratio(first) == pytest.approx(float(values.real.max()), rel=1e-3)
    assert all(ratio(x) <= ratio(first) * 1.001 for x in torch.randn(200, 8))
    alone = designed_rows(current, None, 3, 1e-9)
    assert not alone[3:].any()
    torch.testing.assert_close(
        (3**0.5 * alone[:3] @ torch.linalg.svd(current)[0][:, :3]).abs(), torch.eye(3), atol=1e-4, rtol=0
    )


def test_a_rank_is_kept_by_what_it_does_to_new_inputs_against_past_ones() -> None:
    rows, current, past = torch.randn(4, 8), moment(1), moment(2)
    for row, share in zip(rows, kept_shares(rows, current, past, 3.0), strict=True):
        eta = (row @ past @ row) / (row @ past @ row + 3 * row @ current @ row)
        torch.testing.assert_close(share, 1 - eta)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_first_task_trains_a_and_b_and_later_ones_b_alone(stages_of, passes: int) -> None:
    weights = ["options.general=0.3", "options.isolation=0.6", "train.weight_decay=0"]
    stages, train = stages_of("loda", "options.rank=3", "options.batches=2", f"options.passes={passes}", *weights)
    adapter = next(adapter for adapter in stages.method.adapters if adapter.name == "image.0.k")
    w = torch.tensor([0.3] * 3 + [0.6] * 3)
    total = 0.0
    for task in range(2):
        stages.begin(task)
        designed = adapter.designed.clone()
        assert bool(designed[3:].any()) == (task == 1), "no isolation branch without a past"
        if task:
            past = stages.memory[0]["image.0.q.moment"]
            torch.testing.assert_close(past, total)
        train(task)
        train(task)
        delta = adapter.update()
        if task == 0:
            assert (delta.A - designed)[:3].abs().max() > 1e-3 and not delta.B[:, 3:].any()
        else:
            torch.testing.assert_close(delta.A, designed)
        expected = w * adapter.B.detach()
        torch.testing.assert_close(delta.B, expected)
        stages.end()
        current = stages.memory[task]["image.0.q.moment"] - total
        left = stages.updates[task][adapter.name]
        if task == 0:
            torch.testing.assert_close(left.B, expected)
        elif passes == 1:
            energies = [[float(a @ m @ a) for a in designed[:3]] for m in (past, current)]
            shares = torch.tensor([1 - p / (p + 3 * c) for p, c in zip(*energies, strict=True)])
            torch.testing.assert_close(left.B[:, :3], expected[:, :3] * shares, rtol=1e-3, atol=1e-6)
            assert torch.equal(left.B[:, 3:], expected[:, 3:]), "isolation is merged whole, as in the released code"
        assert (left.B.norm() < expected.norm()) == (task == 1)
        if passes == 2:  # two measurements of the same inputs with nearly the same weights
            seen = []
            norm = stages.method.backbone.model.visual.transformer.resblocks[0].ln_1
            handle = norm.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.detach()))
            with torch.no_grad():
                for batch in stages.scan_batches(task, 2):
                    stages.method.backbone(image=batch["image"])
            handle.remove()
            x = torch.cat(seen).flatten(0, 1)
            torch.testing.assert_close(current, 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        total = stages.memory[task]["image.0.q.moment"]
        stages.engine.close()
