"""NuSA-CL's directions are the trailing singular vectors of the weights so far, and M alone is trained in them."""

import torch
from peft.tuners.osf.utils import decompose_weight_matrix

from r1p_dist.methods.nusa_cl import trailing


def test_the_directions_are_the_trailing_ones_beyond_the_energy() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(7, 5))[0], torch.linalg.qr(torch.randn(5, 5))[0]
    weight = left @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5])) @ right.T  # squares: 16 9 4 1 .25 of 30.25
    both = trailing(weight, 3, 0.8)  # the first two hold .826
    U, V = both[:, :7].T, both[:, 7:].T
    torch.testing.assert_close(U @ U.T, left[:, 2:] @ left[:, 2:].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(V @ V.T, right[:, 2:] @ right[:, 2:].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(U.T @ weight @ V, torch.diag(torch.tensor([2.0, 1.0, 0.5])), atol=1e-5, rtol=0)
    parts = decompose_weight_matrix(weight, top_k=2)  # PEFT's own, which trains in these directions too
    torch.testing.assert_close(U @ U.T, parts["U_low"] @ parts["U_low"].T, atol=1e-5, rtol=0)
    torch.testing.assert_close(V @ V.T, parts["V_low"].T @ parts["V_low"], atol=1e-5, rtol=0)
    both = trailing(weight, 4, 0.95)  # the first three hold .959, so two are left
    assert not both[:2].any() and (both[2:].square().sum(1) > 1.99).all()


def test_only_m_trains_and_what_it_leaves_lies_in_the_directions_of_the_weights_so_far(stages_of) -> None:
    stages, train = stages_of("nusa_cl", "options.rank=5", "options.energy=0.5")
    adapter = next(adapter for adapter in stages.method.adapters if adapter.name == "image.0.fc1")
    assert {name.rpartition(".")[2] for name in stages.method.trainable_parameters()} == {"M"}
    assert stages.method.count_parameters() == 25 * len(stages.method.adapters)
    for task in range(2):
        stages.begin(task)
        weight = adapter.linear.weight.detach().clone()
        U, _, Vt = torch.linalg.svd(weight, full_matrices=False)
        U, V = U[:, -5:], Vt[-5:].T
        torch.testing.assert_close(adapter.B @ adapter.B.T, U @ U.T, atol=1e-4, rtol=0)
        torch.testing.assert_close(adapter.A.T @ adapter.A, V @ V.T, atol=1e-4, rtol=0)
        frozen = adapter.A.clone(), adapter.B.clone()
        train(task)
        assert torch.equal(adapter.A, frozen[0]) and torch.equal(adapter.B, frozen[1])
        stages.end()
        change = adapter.linear.weight.detach() - weight
        torch.testing.assert_close(change, (adapter.B @ adapter.M @ adapter.A).detach(), atol=1e-6, rtol=1e-4)
        assert change.norm() > 1e-2
        torch.testing.assert_close(U @ (U.T @ change @ V) @ V.T, change, atol=1e-5, rtol=0)
        stages.engine.close()
