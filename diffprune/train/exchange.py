"""Gradients of a scorer over the workers of a training: averaged in one exchange, while each goes on with something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffprune.train.context import Context


def begun(context: Context, parameters: Sequence[nn.Parameter], values: Tensor) -> Callable[[], Tensor]:
    """Begin to average the gradients of some parameters over the workers, and to add up values [n].

    What this returns waits for both, puts the averages into place, and gives the sums. A parameter that has no gradient on a worker
    counts as 0 there; one that has none on any is left without, as on one worker, where the optimizer passes it over.
    """
    if context.world == 1:
        return lambda: values
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=values.device)
    sums = context.begin_sum(torch.cat([*(grad.flatten().float() for grad in grads), reached, values]))

    def arrived() -> Tensor:
        *found, times, total = sums().split([*(p.numel() for p in parameters), len(parameters), len(values)])
        for parameter, one, somewhere in zip(parameters, found, (times > 0).tolist(), strict=True):
            parameter.grad = (one / context.world).view_as(parameter).to(parameter.dtype) if somewhere else None
        return total

    return arrived


def alike(context: Context, networks: nn.Module) -> None:
    """Give every worker the numbers of the first: other hardware may have built them with another last bit."""
    for value in networks.state_dict().values():
        if context.world > 1 and value.is_floating_point():
            value.copy_(context.sum(value if context.rank == 0 else torch.zeros_like(value)))
