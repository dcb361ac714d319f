"""Ten pictures in place of 1,297: a data set distilled through the fit of the classifier that is trained on it.

A logistic regression is fitted to ten synthetic pictures of digits, one for each class, and its loss on the 1,297 real
ones is differentiated in the pixels of the ten, through the fit, by il.bilevel. Trained on nothing but these ten, the
classifier is better on new digits than one trained on ten real ones or on the means of the classes.

    python examples/gallery/data_distillation.py            # 15 seconds; picture in runs/gallery/
    python examples/gallery/data_distillation.py --smoke    # fewer steps
"""

# %%
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/data_distillation.png")
CLASSES, STRENGTH, STEPS = 10, 1e-3, 15 if SMOKE else 60
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)

# %% 8 x 8 pictures, ink from 0 to 1
digits = load_digits()
pictures, labels = torch.tensor(digits.data / 16, **float64), torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=generator)
(X_new, y_new), (X, y) = ((pictures[part], labels[part]) for part in (order[:500], order[500:]))
each = torch.arange(CLASSES)


# %% The classifier: weights [64 + 1, classes], fitted to any pictures
def logits(w: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    return pictures @ w[:-1] + w[-1]


def loss(w: torch.Tensor, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits(w, pictures), labels) + STRENGTH * (w**2).sum()


fit, zeros = il.solvers.LBFGS(rtol=1e-6, max_steps=500), torch.zeros(65, CLASSES, **float64)

# %% Ten pictures whose fit is good on the real ones
first = torch.stack([X[y == k][0] for k in each])
means = torch.stack([X[y == k].mean(0) for k in each])
result = il.bilevel(
    lambda w, pictures: cross_entropy(logits(w, X), y),
    il.argmin(lambda w, pictures: loss(w, pictures, each), il.solvers.LBFGS(max_steps=500)),
    means,
    init=zeros,
    optimizer=partial(torch.optim.Adam, lr=0.02),
    max_steps=STEPS,
    rtol=1e-2,
)
print(result.explain())

# %%
accuracy = lambda w: float((logits(w, X_new).argmax(1) == y_new).double().mean())  # noqa: E731
scores = {
    "one real picture each": accuracy(fit(loss, zeros, first, each)),
    "the mean of each class": accuracy(fit(loss, zeros, means, each)),
    "ten distilled pictures": accuracy(fit(loss, zeros, result.theta, each)),
    f"all {len(y):,} real pictures": accuracy(fit(loss, zeros, X, y)),
}
for name, score in scores.items():
    print(f"accuracy on {len(y_new)} new digits, trained on {name:24s} {score:.3f}")

# %% The picture
fig = plt.figure(figsize=(11, 2.6), layout="constrained")
parts = fig.subfigures(1, 3, width_ratios=[1, 1, 1.1])
# what the ten have in common hides what tells them apart, which is all that counts
apart = result.theta - result.theta.mean(0)
for part, title, shown in ((parts[0], "one real picture each", first), (parts[1], "distilled, less their mean", apart)):
    part.suptitle(title)
    limit = float(shown.abs().max())
    for axis, picture in zip(part.subplots(2, 5).flat, shown, strict=True):
        axis.axis("off")
        axis.imshow(picture.reshape(8, 8), cmap="RdBu_r", vmin=-limit, vmax=limit)
axis = parts[2].subplots()
axis.barh(list(scores), list(scores.values()), color=["0.6", "0.6", "C3", "0.6"])
axis.set(xlim=(0.5, 1), xlabel="accuracy on new digits")
axis.invert_yaxis()
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
real, mean, distilled, everything = scores.values()
assert distilled > max(real, mean)
assert SMOKE or distilled > 0.93
