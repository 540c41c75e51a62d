"""WiSE-FT leaves the elementwise mean of a task's start and end (arXiv 2109.01903)."""

import torch

SHARE = 0.7


def test_a_task_leaves_the_mean_of_its_start_and_end(stages_of) -> None:
    stages, train = stages_of("wise_ft", f"options.share={SHARE}")
    parameters = stages.method.trainable_parameters()
    left = None
    for task in range(2):
        stages.begin(task)
        start = {name: value.detach().clone() for name, value in parameters.items()}
        assert left is None or all(torch.equal(start[name], left[name]) for name in left), "goes on from the mean"
        train(task)
        tuned = {name: value.detach().clone() for name, value in parameters.items()}
        moved = sum(float((tuned[name] - start[name]).abs().sum()) for name in tuned)
        assert moved > 1
        stages.end()
        left = {name: value.detach().clone() for name, value in parameters.items()}
        for name in parameters:
            pairs = zip(tuned[name].flatten()[:50].tolist(), start[name].flatten()[:50].tolist(), strict=True)
            expected = torch.tensor([0.7 * one + 0.3 * other for one, other in pairs])
            torch.testing.assert_close(left[name].flatten()[:50], expected, rtol=1e-5, atol=1e-6)
        kept = sum(float((left[name] - start[name]).abs().sum()) for name in left)
        assert abs(kept / moved - SHARE) < 1e-3
        stages.engine.close()
