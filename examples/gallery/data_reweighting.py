"""Which labels are wrong? Weights of 200 training examples, learned from 40 clean ones.

40 % of the training labels are flipped. A logistic regression is fitted to the weighted examples; the loss of its fit
on 40 clean examples is differentiated in the weights, through the fit, by il.bilevel. The weights then tell right
from wrong labels, and the fit is better than without them and than one on the clean examples alone.

    python examples/gallery/data_reweighting.py            # 10 seconds; picture in runs/gallery/data_reweighting.png
    python examples/gallery/data_reweighting.py --smoke    # fewer steps
"""

# %%
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/data_reweighting.png")
FEATURES, TRAINING, CLEAN, FLIPPED = 10, 200, 40, 0.4
STEPS = 15 if SMOKE else 60
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(1)
truth = torch.randn(FEATURES, **float64, generator=generator)


# %%
def draw(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    X = torch.randn(num, FEATURES, **float64, generator=generator)
    noise = torch.randn(num, **float64, generator=generator)
    return X, torch.sign(X @ truth + noise)


(X, y), (X_clean, y_clean), (X_new, y_new) = draw(TRAINING), draw(CLEAN), draw(2000)
wrong = torch.rand(TRAINING, generator=generator) < FLIPPED
y = torch.where(wrong, -y, y)

# %% Fit to weighted examples, and choose the weights by the loss on the clean ones
fit = il.argmin(
    lambda w, logits: (logits.sigmoid() * softplus(-y * (X @ w))).mean() + 0.01 * (w**2).sum(), il.solvers.LBFGS()
)
zeros = torch.zeros(FEATURES, **float64)
result = il.bilevel(
    lambda w, logits: softplus(-y_clean * (X_clean @ w)).mean(),
    fit,
    torch.zeros(TRAINING, **float64),  # all weights 1/2
    init=zeros,
    optimizer=partial(torch.optim.Adam, lr=0.3),
    max_steps=STEPS,
    rtol=1e-2,
)
print(result.explain())

# %%
accuracy = lambda w: float((torch.sign(X_new @ w) == y_new).double().mean())  # noqa: E731
unweighted = il.solvers.LBFGS(rtol=1e-8)(lambda w: softplus(-y * (X @ w)).mean() + 0.02 * (w**2).sum(), zeros)
alone = il.solvers.LBFGS(rtol=1e-8)(lambda w: softplus(-y_clean * (X_clean @ w)).mean() + 0.02 * (w**2).sum(), zeros)
scores = {
    "all examples alike": accuracy(unweighted),
    "clean ones alone": accuracy(alone),
    "weighted": accuracy(result.x),
}
for name, score in scores.items():
    print(f"accuracy on new data, {name:20s} {score:.3f}")
weights = result.theta.sigmoid()
pairs = weights[~wrong][:, None] - weights[wrong]
order = float((pairs > 0).double().mean())  # the area under the curve of "weight" as a test for a right label
print(f"a right label has the larger weight in {order:.1%} of pairs")

# %% The picture
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
left.hist([weights[~wrong], weights[wrong]], bins=20, color=["C0", "C3"], label=["right label", "wrong label"])
left.set(xlabel="learned weight", ylabel="examples")
left.legend(frameon=False)
right.barh(list(scores), list(scores.values()), color=["0.6", "0.6", "C3"])
right.set(xlim=(0.5, 1), xlabel="accuracy on new data")
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert order > 0.75
assert scores["weighted"] > scores["all examples alike"]
