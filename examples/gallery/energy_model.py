"""An energy model for noisy signals: its filters and weights learned through its minimum.

The energy of a signal x, seen as y, is 1/2 |x - y|^2 + sum_k exp(a_k) sum rho(filter_k * x), rho(r) = sqrt(r^2 +
0.01^2). Its minimum is the denoised signal. First only the weight of one filter (differences: total variation) is
learned, then four filters with their weights, both by il.bilevel on 24 pairs. The signals are smooth with kinks, so
that filters of higher order win on new ones.

    python examples/gallery/energy_model.py            # half a minute; picture in runs/gallery/energy_model.png
    python examples/gallery/energy_model.py --smoke    # fewer steps
"""

# %%
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import implicitlayer as il

SMOKE = "--smoke" in sys.argv
FIGURE = Path("runs/gallery/energy_model.png")
LENGTH, SIGNALS, NOISE, FILTERS, TAPS = 48, 24, 0.1, 4, 5
STEPS = 10 if SMOKE else 60
float64 = {"dtype": torch.float64}
generator = torch.Generator().manual_seed(0)


# %% Signals of straight pieces
def draw(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and noisy signals [num, length]."""
    bends = (torch.rand(num, LENGTH, generator=generator) < 0.08).double()
    slopes = (bends * torch.randn(num, LENGTH, **float64, generator=generator)).cumsum(1) * 0.1
    clean = slopes.cumsum(1)
    clean = (clean - clean.mean(1, keepdim=True)) / clean.std(1, keepdim=True).clamp_min(0.1)
    return clean, clean + NOISE * torch.randn(num, LENGTH, **float64, generator=generator)


(clean, seen), (clean_new, seen_new) = draw(SIGNALS), draw(100)


# %% The energy, one value for each signal
def energy(x: torch.Tensor, y: torch.Tensor, theta: dict[str, torch.Tensor]) -> torch.Tensor:
    filters = theta["filters"] if "filters" in theta else differences[:1]
    responses = torch.nn.functional.conv1d(x[:, None], filters[:, None])  # [signals, filters, length - 4]
    penalty = ((responses**2 + 1e-4).sqrt().sum(2) * theta["log_weights"].exp()).sum(1)
    return 0.5 * ((x - y) ** 2).sum(1) + penalty


differences = torch.zeros(FILTERS, TAPS, **float64)
differences[:, 1:3] = torch.tensor([-1.0, 1.0], **float64)
denoise = il.argmin(energy, il.solvers.LBFGS(max_steps=300, rtol=1e-5), batch_dims=1)


def learn(theta: dict[str, torch.Tensor]) -> il.BilevelResult:
    return il.bilevel(
        lambda x, theta: ((x - clean) ** 2).mean(),
        il.argmin(lambda x, theta: energy(x, seen, theta), il.solvers.LBFGS(max_steps=300), batch_dims=1),
        theta,
        init=seen,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        max_steps=STEPS,
        rtol=1e-2,
    )


# %%
variation = learn({"log_weights": torch.full((1,), -3.0, **float64)})
begin = differences.clone()
begin[2:, 1:4] = torch.tensor([1.0, -2.0, 1.0], **float64)  # two of them begin at second differences
begin = begin + 0.1 * torch.randn(FILTERS, TAPS, **float64, generator=generator)
model = learn({"log_weights": torch.full((FILTERS,), -4.0, **float64), "filters": begin})
with torch.no_grad():
    found = {name: denoise(seen_new, seen_new, r.theta) for name, r in (("variation", variation), ("model", model))}
errors = {name: float(((x - clean_new) ** 2).mean()) for name, x in (("noisy", seen_new), *found.items())}
print(f"squared error on 100 new signals: {', '.join(f'{name} {error:.5f}' for name, error in errors.items())}")

# %% The picture
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3), layout="constrained", width_ratios=(2, 1))
left.plot(seen_new[3], ".", color="0.6", label="seen")
left.plot(clean_new[3], color="k", lw=3, alpha=0.25, label="truth")
left.plot(found["variation"][3], color="C0", lw=1, label="total variation, learned weight")
left.plot(found["model"][3], color="C3", lw=1.4, label="learned filters")
left.legend(frameon=False, fontsize=8)
left.set(title="a new signal")
for k, taps in enumerate(model.theta["filters"]):
    right.plot(taps * model.theta["log_weights"][k].exp(), "o-", ms=3, label=f"filter {k + 1}")
right.set(title="filters times weights", xticks=range(TAPS))
FIGURE.parent.mkdir(parents=True, exist_ok=True)
fig.savefig(FIGURE, dpi=110)
print(f"picture: {FIGURE}")

# %%
assert errors["variation"] < errors["noisy"]
assert errors["model"] < (1.0 if SMOKE else 0.85) * errors["variation"]
