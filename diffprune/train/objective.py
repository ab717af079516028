"""A method's own objective: what it must give, what of it is recorded, and what is told of one that fails."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffprune.core.errors import first_line, with_class
from diffprune.core.exits import ours
from diffprune.core.fitted import Loss

TERMS = ("nll", "penalty", "kept", "score_sd", "overlap")  # of `Loss.terms`, those of a step record


class BadObjective(Exception):
    """A mistake in a method's own code, or a loss that nothing can be learnt from; trying again gives the same."""


@contextmanager
def told(about: str, others: bool) -> Iterator[None]:
    """Around an objective and its gradients.

    about: the method, seed and step; others: other workers take part, those of a spread decoder, whose end looks like any error.

    Raises:
        BadObjective: the method's code fails, with the place; memory, devices and storage that fail are raised as they are, as
            trying again may help.
    """
    try:
        yield
    except BadObjective as error:
        raise BadObjective(f"{about}: {error}") from None
    except Exception as error:
        if not (said := mistake(error, others, "its objective")):
            raise
        raise BadObjective(f"{about}: {said}") from error


def mistake(error: Exception, others: bool, code: str) -> str:
    """What is said of an error that a method's own code made; "" of memory, devices, storage and other workers that fail.

    code: what of the method failed; others: see `told`.
    """
    plain = type(error) in (RuntimeError, NotImplementedError, torch.linalg.LinAlgError)
    if isinstance(error, OSError | MemoryError) or (isinstance(error, RuntimeError) and (others or not plain)):
        return ""
    meant = isinstance(error, ValueError) and ours(error)
    return first_line(error) if meant else f"{code} fails: {with_class(error)} ({_place(error)})"


def _place(error: BaseException) -> str:
    """File and line of the innermost code that is no installed library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def checked(loss: Any) -> Loss:
    """What an objective gave.

    Raises:
        BadObjective: no `Loss`, one of several numbers, or one in which nothing that trains has a part.
    """
    if not isinstance(loss, Loss):
        raise BadObjective(f"its objective gives {type(loss).__name__}, no Loss")
    for name, value in {"total": loss.total, **loss.terms}.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise BadObjective(f"its loss has {shown} as {name!r}, which must be a tensor of one number")
    if not loss.total.requires_grad:
        raise BadObjective("its loss has no gradient: nothing that trains has a part in it")
    return loss


def recorded(loss: Loss) -> Tensor:
    """[1 + 2 T]: the total, each of `TERMS`, 0 where it is not given, and whether it is missing; to be added up over parts and
    workers, for which it has the same length whatever the method gives."""
    total = loss.total.detach().float().reshape(())
    terms = [loss.terms[name].detach().to(total).reshape(()) if name in loss.terms else None for name in TERMS]
    values = [torch.zeros_like(total) if term is None else term for term in terms]
    return torch.stack([total, *values, *(torch.full_like(total, term is None) for term in terms)])


def read(sums: Sequence[float]) -> dict[str, float]:
    """Sums of `recorded` by name: "total", and the terms that every part had."""
    total, values, missing = sums[0], sums[1 : 1 + len(TERMS)], sums[1 + len(TERMS) :]
    return {"total": total, **{name: value for name, value, absent in zip(TERMS, values, missing, strict=True) if not absent}}
