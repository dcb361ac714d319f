"""Few-shot density estimation: a prior density and its weight are meta-learned, with KL as the regulariser.

Every task is a density over 40 bins of which only 8 samples are seen. The inner problem fits logits phi to them,
    argmin_phi  -sum f log softmax(phi) + strength * KL(softmax(theta) || softmax(phi)),
and the outer problem asks for the log-likelihood of 200 other samples. The closed form (f + s q) / (1 + s)
is a check only: the layer gets an ordinary solver.

    python examples/gallery/density_estimation.py            # 20 seconds; picture in runs/gallery/
    python examples/gallery/density_estimation.py --smoke    # a few seconds
"""

# %%
import argparse
from pathlib import Path

import torch

import implicitlayer as il

NUM_BINS = 40
NUM_SHOTS = 8  # samples seen of a task
NUM_QUERIES = 200  # samples that score the density
NUM_TASKS = 32  # per meta-step
META_STEPS = 150
LEARNING_RATE = 0.1


# %%
def draw_tasks(num_tasks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies of support and query samples, [tasks, bins] each: three bumps at fixed places, weights by task."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.arange(NUM_BINS, dtype=torch.float64)
    centres = torch.tensor([6.0, 18.0, 31.0], dtype=torch.float64)
    bumps = torch.exp(-0.5 * ((bins - centres[:, None]) / 2.0) ** 2)
    weights = torch.rand(num_tasks, 3, dtype=torch.float64, generator=generator)
    density = weights @ bumps + 1e-3
    density = density / density.sum(-1, keepdim=True)

    def frequencies(num_samples: int) -> torch.Tensor:
        samples = torch.multinomial(density, num_samples, replacement=True, generator=generator)
        return torch.nn.functional.one_hot(samples, NUM_BINS).double().mean(1)

    return frequencies(NUM_SHOTS), frequencies(NUM_QUERIES)


def fit_loss(logits: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood per sample, one value per task."""
    return -(frequencies * logits.log_softmax(-1)).sum(-1)


def score(layer: il.ImplicitLayer, theta: torch.Tensor, tasks: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean negative log-likelihood of the query samples."""
    support, query = tasks
    logits = layer(theta.detach().expand(len(support), NUM_BINS), theta, support)
    return fit_loss(logits, query).mean()


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few meta-steps")
    parser.add_argument("--figure", type=Path, default=Path("runs/gallery/density_estimation.png"))
    options = parser.parse_known_args()[0]  # a notebook has arguments of its own
    meta_steps = 25 if options.smoke else META_STEPS

    theta = torch.zeros(NUM_BINS, dtype=torch.float64, requires_grad=True)  # logits of the prior density: uniform
    strength = il.LearnedStrength(torch.tensor(1.0, dtype=torch.float64))
    kullback_leibler = il.bregman(lambda logits: logits.logsumexp(-1))
    layer = il.argmin(
        il.proximal(fit_loss, strength, divergence=kullback_leibler),
        il.solvers.NewtonCG(max_steps=20, rtol=1e-8),
        batch_dims=1,
    )
    test = draw_tasks(200, seed=10_000)
    with torch.no_grad():
        untrained = min(  # the uniform prior with the best weight for the test tasks themselves
            float(fit_loss(((test[0] + s / NUM_BINS) / (1 + s)).log(), test[1]).mean())
            for s in torch.logspace(-2, 1, 31)
        )

    optimizer = torch.optim.Adam([theta, *strength.parameters()], lr=LEARNING_RATE)
    for step in range(meta_steps):
        optimizer.zero_grad()
        tasks = draw_tasks(NUM_TASKS, seed=step)
        loss = score(layer, theta, tasks)
        loss.backward()
        if step == 0:  # the meta-gradient against that of the closed form
            start = theta.detach().requires_grad_()
            density = (tasks[0] + strength() * start.softmax(-1)) / (1 + strength())
            expected = torch.autograd.grad(fit_loss(density.log(), tasks[1]).mean(), [start, *strength.parameters()])
            for parameter, gradient in zip((theta, *strength.parameters()), expected, strict=True):
                assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
        optimizer.step()
        if (step + 1) % max(1, meta_steps // 5) == 0:
            print(f"meta-step {step + 1:4d}   strength {strength().item():.2f}   query loss {loss.item():.4f}")

    with torch.no_grad():
        learned = float(score(layer, theta, test))
        print(f"\n200 new tasks, {NUM_SHOTS} samples each, negative log-likelihood per sample (lower is better)")
        print(f"  uniform prior, best weight in hindsight   {untrained:.4f}")
        print(f"  learned prior and weight                  {learned:.4f}")
        draw_figure(options.figure, layer, theta, test)
    assert learned < untrained - (0.05 if meta_steps < META_STEPS else 0.2)


# %%
def draw_figure(figure: Path, layer: il.ImplicitLayer, theta: torch.Tensor, tasks) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    support, query = tasks
    adapted = layer(theta.expand(len(support), NUM_BINS), theta, support).softmax(-1)
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained", sharey=True)
    axes[0].bar(range(NUM_BINS), theta.softmax(-1), color="C3", width=1)
    axes[0].set(title="the learned prior")
    for task, axis in zip((0, 1), axes[1:], strict=True):
        axis.bar(range(NUM_BINS), query[task], color="0.8", width=1, label=f"{NUM_QUERIES} other samples")
        axis.plot(range(NUM_BINS), adapted[task], color="C3", label="estimate")
        axis.plot(
            support[task].nonzero()[:, 0], 0 * support[task][support[task] > 0], "k^", label=f"{NUM_SHOTS} samples"
        )
        axis.set(title=f"new task {task + 1}")
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    figure.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)
    print(f"picture: {figure}")


# %%
if __name__ == "__main__":
    main()
