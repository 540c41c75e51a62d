"""The pool against the formulas of DAC (methods.md section 1), written out here one expert and one sample at a time."""

import copy

import pytest
import torch
from torch import nn

from r1p_dist.adapters import AdaptedLinear, Factors, FusedProjection, Routing
from r1p_dist.adapters.low_rank import recorded
from r1p_dist.adapters.pool import share_votes, top
from r1p_dist.errors import InputError

BATCH, TOKENS, IN, OUT = 5, 7, 12, 9


def make(seed: int = 0, **options) -> AdaptedLinear:
    torch.manual_seed(seed)
    defaults = {"rank": 6, "alpha": 3.0, "active": 4, "merged": 2}
    adapted = AdaptedLinear(nn.Linear(IN, OUT), **{**defaults, **options}).double()
    nn.init.normal_(adapted.B)
    return adapted


def example(seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected_votes(adapted: AdaptedLinear, guides: torch.Tensor, weights: list[int]) -> list[int]:
    votes = [0] * adapted.rank
    for guide, weight in zip(guides, weights, strict=True):
        probabilities = (adapted.router.weight @ guide + adapted.router.bias).softmax(0).tolist()
        for j in sorted(range(adapted.rank), key=lambda j: (-probabilities[j], j))[: adapted.active]:
            votes[j] += weight
    return votes


def vote_of(adapted: AdaptedLinear, x: torch.Tensor) -> list[int]:
    return expected_votes(adapted, x[:, 0], [1] * len(x))


def expected_output(adapted: AdaptedLinear, x: torch.Tensor, active: list[int]) -> torch.Tensor:
    y = x @ adapted.linear.weight.T + adapted.linear.bias
    for j in active:
        y = y + adapted.scaling * (x @ adapted.A[j])[..., None] * adapted.B[:, j]
    return y


def most(votes: list[int], count: int) -> list[int]:
    return sorted(range(len(votes)), key=lambda j: (-votes[j], j))[:count]


@pytest.mark.parametrize("guide", ["first", "mean", "eot"])
def test_vote_and_forward_follow_the_formulas(guide: str) -> None:
    weights = [1, 4, 1, 2, 1]
    routing = Routing(weights=torch.tensor(weights), end=torch.tensor([2, 6, 3, 1, 0]))
    adapted = make(guide=guide, routing=routing)
    x = example()
    guides = {"first": x[:, 0], "mean": x.mean(1), "eot": torch.stack([x[i, e] for i, e in enumerate(routing.end)])}
    votes = expected_votes(adapted, guides[guide], weights)
    y = adapted(x)
    assert adapted.activation_counts.tolist() == votes
    torch.testing.assert_close(y, expected_output(adapted, x, most(votes, 4)))
    adapted(example(2))
    assert adapted.activation_counts.sum() == 2 * 4 * sum(weights), "every sample casts `active` votes in each step"


def test_padding_is_left_out_of_the_mean_guide() -> None:
    padding = torch.arange(TOKENS) <= torch.tensor([2, 6, 3, 1, 0])[:, None]
    adapted = make(guide="mean", routing=Routing(padding=padding))
    x = example()
    means = torch.stack([x[i][padding[i]].mean(0) for i in range(BATCH)])
    adapted(x)
    assert adapted.activation_counts.tolist() == expected_votes(adapted, means, [1] * BATCH)


def test_gradients_equal_autograd_through_the_dense_form() -> None:
    adapted, x = make(), example().requires_grad_()
    target = torch.randn(BATCH, TOKENS, OUT, dtype=torch.float64)
    (adapted(x) * target).sum().backward()
    active = most(adapted.activation_counts.tolist(), 4)
    reference, y = make(), example().requires_grad_()
    (expected_output(reference, y, active) * target).sum().backward()
    torch.testing.assert_close(adapted.A.grad, reference.A.grad)
    torch.testing.assert_close(adapted.B.grad, reference.B.grad)
    torch.testing.assert_close(x.grad, y.grad)
    idle = [j for j in range(adapted.rank) if j not in active]
    assert adapted.A.grad[idle].abs().max() == 0 and adapted.B.grad[:, idle].abs().max() == 0
    assert adapted.router.weight.grad is None and not adapted.router.weight.requires_grad
    assert adapted.linear.weight.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout: float) -> None:
    adapted = make(dropout=dropout)

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)  # the same dropout mask every time
        return torch.func.functional_call(adapted, {"A": A, "B": B}, (x,))

    inputs = (example()[:2, :3].clone(), adapted.A.detach().clone(), adapted.B.detach().clone())
    assert torch.autograd.gradcheck(run, tuple(tensor.requires_grad_() for tensor in inputs))


def test_dropout_applies_to_the_update_alone_with_its_mean_kept() -> None:
    adapted, x = make(dropout=0.25, active=6), example()
    frozen = x @ adapted.linear.weight.T + adapted.linear.bias
    update = expected_output(adapted, x, list(range(6))) - frozen
    torch.manual_seed(0)
    draws = torch.stack([adapted(x) - frozen for _ in range(4000)])
    assert (draws.std(0) > 0).all()
    error = (draws.mean(0) - update) / (draws.std(0) / 4000**0.5)
    assert error.abs().max() < 5  # 315 elements within five standard errors


def mean_probabilities(adapted: AdaptedLinear, x: torch.Tensor, weights: list[int]) -> torch.Tensor:
    """(rank,): of every sample as often as it occurs."""
    samples = [sample for sample, weight in zip(x[:, 0], weights, strict=True) for _ in range(weight)]
    each = [(adapted.router.weight @ sample + adapted.router.bias).softmax(0) for sample in samples]
    return sum(each) / len(each)


@pytest.mark.parametrize("weights", [None, [1, 4, 1, 2, 1]])
@pytest.mark.parametrize("router_grad", ["straight_through", "gated"])
def test_router_gradients(router_grad: str, weights: list[int] | None) -> None:
    routing = Routing(weights=None if weights is None else torch.tensor(weights))
    adapted, x = make(router_grad=router_grad, routing=routing), example()
    y = adapted(x)
    active = most(adapted.activation_counts.tolist(), 4)
    q = mean_probabilities(adapted, x, weights or [1] * BATCH)
    hard = torch.zeros(6, dtype=torch.float64)
    hard[active] = 1
    mask = hard + (q - q.detach()) if router_grad == "straight_through" else hard * 4 * q / q[active].sum()
    frozen = x @ adapted.linear.weight.T + adapted.linear.bias
    reference = frozen + adapted.scaling * torch.einsum("bti,ji,j,oj->bto", x, adapted.A, mask, adapted.B)
    torch.testing.assert_close(y, reference)
    target = torch.randn_like(y)
    parameters = [adapted.router.weight, adapted.router.bias, adapted.A, adapted.B]
    ours = torch.autograd.grad((y * target).sum(), parameters)
    expected = torch.autograd.grad((reference * target).sum(), parameters)
    torch.testing.assert_close(ours, expected)
    assert ours[0].abs().max() > 0


def test_merge_adds_the_most_counted_experts_and_eval_uses_the_weight_alone() -> None:
    adapted = make().float()
    pristine = adapted.linear.weight.clone()
    for seed in (1, 2, 3, 4):
        adapted(example(seed).float())
    counts = adapted.activation_counts.tolist()
    assert set(most(counts, 2)) != set(most(vote_of(adapted, example(4).float()), 2)), "of the task, not of a batch"
    chosen = adapted.merge()
    assert chosen.tolist() == most(counts, 2)
    delta = sum(adapted.scaling * torch.outer(adapted.B[:, j], adapted.A[j]) for j in chosen)
    torch.testing.assert_close(adapted.linear.weight, pristine + delta)
    torch.testing.assert_close(adapted.merged_delta(), delta)
    adapted.eval()
    x = example().float()
    assert torch.equal(adapted(x), nn.functional.linear(x, adapted.linear.weight, adapted.linear.bias))
    adapted.unmerge_all()
    assert torch.equal(adapted.linear.weight, pristine)


def gate_of(adapted: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
    """(rank,): active * q_j / sum of q over the active experts, 0 for the others."""
    q = mean_probabilities(adapted, x, [1] * BATCH).detach().tolist()
    active = most(vote_of(adapted, x), adapted.active)
    total = sum(q[j] for j in active)
    return torch.tensor([adapted.active * q[j] / total if j in active else 0.0 for j in range(adapted.rank)])


def test_gated_merge_scales_experts_by_the_mean_gate_of_their_own_task() -> None:
    adapted = make(router_grad="gated")
    for task, seeds in enumerate([(1, 2, 3), (4, 5)]):
        if task:
            adapted.reset(torch.Generator().manual_seed(task))
        batches = [example(seed) for seed in seeds]
        for x in batches:
            adapted(x)
        votes = [sum(votes) for votes in zip(*(vote_of(adapted, x) for x in batches), strict=True)]
        gates = torch.stack([gate_of(adapted, x) for x in batches]).mean(0)
        update, chosen = adapted.update(2)
        assert chosen.tolist() == most(votes, 2)
        torch.testing.assert_close(update.A, torch.stack([gates[j] * adapted.A[j].float() for j in most(votes, 2)]))


def test_a_micro_batch_has_one_gate_however_often_its_forward_runs() -> None:
    adapted = make(router_grad="gated")
    first, second, third = (example(seed) for seed in (1, 2, 3))
    torch.utils.checkpoint.checkpoint(adapted, first.clone().requires_grad_(), use_reentrant=False).sum().backward()
    with recorded([adapted]):
        adapted(second)
        adapted(third)
    assert adapted.gate_steps == 2
    torch.testing.assert_close(adapted.gate_sum.float(), gate_of(adapted, first) + gate_of(adapted, second))


def test_merges_accumulate_from_the_pristine_weight_even_in_bf16() -> None:
    adapted = make().to(torch.bfloat16)
    pristine = adapted.linear.weight.clone()
    small = Factors(torch.full((1, IN), 1e-3), torch.ones(OUT, 1), 1.0)
    for _ in range(50):
        adapted.merge_update(small)
    expected = (pristine.float() + 50 * 1e-3).to(torch.bfloat16)
    assert torch.equal(adapted.linear.weight, expected)
    naive = pristine.clone()
    for _ in range(50):
        naive += 1e-3
    assert not torch.equal(naive, expected), "adding step by step in bf16 loses updates, which is why we do not"


def test_ties_go_to_the_lower_index() -> None:
    assert top(torch.tensor([3, 5, 5, 1, 5]), 3).tolist() == [1, 2, 4]
    assert top(torch.zeros(12, dtype=torch.int64), 4).tolist() == [0, 1, 2, 3]


def test_checkpointing_counts_votes_once_and_keeps_gradients() -> None:
    plain, checked = make(dropout=0.3), make(dropout=0.3)
    x = example().requires_grad_()
    for adapted, use_checkpoint in ((plain, False), (checked, True)):
        adapted.orthogonal_to = torch.ones(OUT, 3, dtype=torch.float64)
        torch.manual_seed(3)
        call = torch.utils.checkpoint.checkpoint if use_checkpoint else (lambda f, x, use_reentrant: f(x))
        y = call(adapted, x, use_reentrant=False)
        (y.square().sum() + adapted.terms["ago"]).backward()
    assert torch.equal(plain.activation_counts, checked.activation_counts)
    torch.testing.assert_close(plain.A.grad, checked.A.grad)
    torch.testing.assert_close(plain.B.grad, checked.B.grad)


def test_ago_term_uses_the_most_counted_experts_against_all_past_columns() -> None:
    adapted = make()
    adapted.orthogonal_to = torch.randn(OUT, 8, dtype=torch.float64)
    for seed in (1, 2, 3, 4):
        adapted(example(seed))
    assert set(most(adapted.activation_counts.tolist(), 2)) != set(most(vote_of(adapted, example(4)), 2))
    expected = sum(
        abs((adapted.B[:, j] * adapted.orthogonal_to[:, p]).sum())
        for j in most(adapted.activation_counts.tolist(), 2)
        for p in range(8)
    )
    torch.testing.assert_close(adapted.terms["ago"], expected)


def test_fused_projection_equals_its_three_parts() -> None:
    torch.manual_seed(0)
    fused = FusedProjection(nn.Linear(IN, 3 * IN))
    for i, name in enumerate("qkv"):
        part = AdaptedLinear(fused.linear, 6, 3.0, 4, 2, rows=slice(i * IN, (i + 1) * IN))
        nn.init.normal_(part.B)
        fused.parts[name] = part
    alone = copy.deepcopy(fused)
    fused.double(), alone.double()
    x = example()
    y = fused(x)
    expected = []
    for name, part in alone.parts.items():
        votes = expected_votes(part, x[:, 0], [1] * BATCH)
        assert fused.parts[name].activation_counts.tolist() == votes
        W, b = alone.linear.weight[part.rows], alone.linear.bias[part.rows]
        y_part = x @ W.T + b
        for j in most(votes, 4):
            y_part = y_part + part.scaling * (x @ part.A[j])[..., None] * part.B[:, j]
        expected.append(y_part)
    torch.testing.assert_close(y, torch.cat(expected, -1))
    pristine = fused.linear.weight.clone()
    fused.parts["k"].merge()
    changed = (fused.linear.weight != pristine).any(1)
    assert changed[IN : 2 * IN].all() and not changed[:IN].any() and not changed[2 * IN :].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merged": 5, "active": 4}, "merged=5, active=4"),
        ({"active": 7}, "active=7, rank=6"),
        ({"rank": 10, "active": 4}, "options.rank=10 is larger than a layer of 12 by 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)


def test_reset_is_the_same_for_a_seed_and_has_no_effect_on_the_output() -> None:
    adapted, again = make(0), make(5)
    for module in (adapted, again):
        module(example())
        module.reset(torch.Generator().manual_seed(11))
    assert torch.equal(adapted.A, again.A) and torch.equal(adapted.router.weight, again.router.weight)
    assert adapted.B.abs().max() == 0 and adapted.activation_counts.sum() == 0
    bound = (6 / ((1 + 5) * IN)) ** 0.5  # Kaiming-uniform with a = sqrt(5): sqrt(6 / ((1 + a^2) fan_in))
    assert adapted.A.abs().max() <= bound and adapted.A.abs().max() > 0.9 * bound
    x = example()
    torch.testing.assert_close(adapted(x), x @ adapted.linear.weight.T + adapted.linear.bias)


def active_in(adapted: AdaptedLinear, x: torch.Tensor) -> list[int]:
    """Returns the experts that a forward really used: those whose columns get a gradient."""
    adapted.zero_grad()
    adapted(x).square().sum().backward()
    return [j for j in range(adapted.rank) if adapted.B.grad[:, j].abs().max() > 0]


def test_lagged_votes_choose_the_experts_of_the_next_step() -> None:
    adapted = make(vote="lagged", active=2)
    first, second, third = example(1), example(2), example(3)
    assert active_in(adapted, first) == sorted(most(vote_of(adapted, first), 2)), "the first step uses its own votes"
    assert adapted.activation_counts.sum() == 0, "the votes are counted when the step ends"
    share_votes([adapted])
    assert adapted.activation_counts.tolist() == vote_of(adapted, first)
    assert active_in(adapted, second) == sorted(most(vote_of(adapted, first), 2))
    share_votes([adapted])
    assert active_in(adapted, third) == sorted(most(vote_of(adapted, second), 2))
    share_votes([adapted])
    total = [sum(votes) for votes in zip(*(vote_of(adapted, x) for x in (first, second, third)), strict=True)]
    assert adapted.activation_counts.tolist() == total
    assert most(vote_of(adapted, first), 2) != most(vote_of(adapted, second), 2), "else the test shows nothing"


def test_lagged_votes_of_all_micro_steps_count_together() -> None:
    adapted = make(vote="lagged", active=2)
    for x in (example(1), example(2)):
        adapted(x)
    share_votes([adapted])
    both = [a + b for a, b in zip(vote_of(adapted, example(1)), vote_of(adapted, example(2)), strict=True)]
    assert adapted.activation_counts.tolist() == both
    for x in (example(3), example(4)):  # every micro step of the next step uses the same experts
        assert active_in(adapted, x) == sorted(most(both, 2))


def test_a_new_task_votes_anew() -> None:
    adapted = make(vote="lagged", active=2)
    adapted(example(1))
    share_votes([adapted])
    adapted.reset()
    nn.init.normal_(adapted.B)
    assert active_in(adapted, example(2)) == sorted(most(vote_of(adapted, example(2)), 2))


@pytest.mark.parametrize("vote", ["global", "lagged", "local"])
def test_checkpointing_counts_votes_once_in_every_mode(vote: str) -> None:
    adapted, x = make(vote=vote), example().requires_grad_()
    for step in range(1, 3):
        torch.utils.checkpoint.checkpoint(adapted, x, use_reentrant=False).sum().backward()
        share_votes([adapted])
        assert adapted.activation_counts.tolist() == [step * votes for votes in vote_of(adapted, x.detach())]
