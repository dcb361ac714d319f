"""Problems for the few-shot network, and the same network from PyTorch's own layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from implicitlayer.fewshot import Conv4

Params = dict[str, Tensor]

# Float64 rounds at 1e-16, and 600-term sums through four layers lose some digits; derivatives have sizes up to 1e3.
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def plain_logits(params: Params, images: Tensor, downsample: str = "stride") -> Tensor:
    """The same network from torch's own layers, for one task."""
    x, stride = images, 2 if downsample == "stride" else 1
    for block in range(1, 5):
        x = F.conv2d(x, params[f"conv{block}.weight"].permute(0, 3, 1, 2), None, stride, padding=1)
        x = F.batch_norm(x, None, None, params[f"norm{block}.weight"], params[f"norm{block}.bias"], training=True)
        x = F.relu(x) if downsample == "stride" else F.max_pool2d(F.relu(x), 2)
    return F.linear(x.permute(0, 2, 3, 1).flatten(1), params["head.weight"], params["head.bias"])


def problem(
    network: Conv4, num_tasks: int, num_images: int, dtype: torch.dtype = torch.float64
) -> tuple[Params, Tensor, Tensor]:
    """Stacked parameters (norms moved off 1 and 0), images and labels."""
    generator = torch.Generator().manual_seed(0)
    draws = [network.init(generator, dtype=dtype) for _ in range(num_tasks)]
    params = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    params = {
        name: p + 0.2 * torch.rand(p.shape, generator=generator, dtype=dtype) if "norm" in name else p
        for name, p in params.items()
    }
    size = network.image_size
    images = torch.rand(num_tasks, num_images, network.in_channels, size, size, generator=generator, dtype=dtype)
    labels = torch.arange(num_images).remainder(network.num_ways).expand(num_tasks, num_images)
    return params, images, labels


def random_like(params: Params) -> Params:
    return {name: torch.randn_like(p) for name, p in params.items()}


def task(params: Params, index: int) -> Params:
    return {name: p[index] for name, p in params.items()}


def product_of(loss: Callable[[Params, Tensor, Tensor], Tensor], mode: str) -> Callable[..., Params]:
    """(params, images, labels, direction) -> Hessian-vector product, by reverse or by forward over reverse mode."""

    def product(params: Params, images: Tensor, labels: Tensor, direction: Params) -> Params:
        gradient = torch.func.grad(lambda p: loss(p, images, labels))
        if mode == "forward":
            return torch.func.jvp(gradient, (params,), (direction,))[1]
        return torch.func.vjp(gradient, params)[1](direction)[0]

    return product
