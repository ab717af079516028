"""Batches drawn ahead and gradients that travel meanwhile: what every worker sees, in which order, and when one fails."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffprune.core import registry
from diffprune.train.ahead import AHEAD, Ahead, BadData
from diffprune.train.context import Context
from diffprune.train.exchange import alike, begun
from diffprune.train.loop import batches
from diffprune.train.recipe import Recipe
from diffprune.train.scorer_trainer import ScorerTrainer
from diffprune.vlm.load import load


class Group:
    """What the workers of one process tell each other: the n-th sum that each begins is that of the others' n-th."""

    def __init__(self, world: int) -> None:
        self.world, self.told, self.changed = world, list[dict[int, Tensor]](), threading.Condition()

    def tell(self, rank: int, number: int, values: Tensor) -> None:
        with self.changed:
            while len(self.told) <= number:
                self.told.append({})
            self.told[number][rank] = values.clone()
            self.changed.notify_all()

    def total(self, number: int) -> Tensor:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.told[number]) == self.world, 20), f"sum {number} is waited for in vain"
        return torch.stack([self.told[number][rank] for rank in range(self.world)]).sum(0)


class Member(Context):
    """One worker, a thread."""

    device = torch.device("cpu")

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank, self.world, self.begun = group, rank, group.world, 0

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        number, self.begun = self.begun, self.begun + 1
        self.group.tell(self.rank, number, values)
        return lambda: self.group.total(number)

    def progress(self, text: str) -> None:
        pass


def together(world: int, work: Callable[[Member], Any]) -> list[Any]:
    """What `work` gives, or raises, on each worker."""
    group, found = Group(world), [None] * world

    def one(rank: int) -> None:
        try:
            found[rank] = work(Member(group, rank))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_batches_come_in_order_and_no_more_are_drawn_than_steps_need() -> None:
    drawn: list[int] = []

    def work(context: Member) -> list[tuple[Any, list[float]]]:
        def stream() -> Iterator[Any]:
            for number in range(100):
                drawn.append(number)
                yield 10 * context.rank + number

        ahead, found = Ahead(context, stream(), 5, lambda batch: (batch, 1.0)), []
        for step in range(5):
            assert drawn.count(step + AHEAD) <= 1
            batch, counted = ahead.next()
            ahead.draw()
            found.append((batch, counted.tolist()))
        return found

    own, other = together(2, work)
    assert own == [(number, [10.0 + 2 * number, 2.0]) for number in range(5)]
    assert [batch for batch, _ in other] == [10, 11, 12, 13, 14]
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_batch_that_one_worker_cannot_draw_ends_all_at_its_step_and_leaves_nobody_waiting(bad: int) -> None:
    def work(context: Member) -> Any:
        def stream() -> Iterator[Any]:
            for number in range(100):
                if context.rank == 1 and number == bad:
                    raise ValueError("7 of 9 rows are broken")
                yield number

        ahead = Ahead(context, stream(), 6, lambda batch: (1.0, 1.0))
        for step in range(6):
            try:
                ahead.next()
            except BadData as error:
                return step, str(error), context.begun
            ahead.draw()
        return None

    asked = min(6, bad + AHEAD)  # sums that each has begun by then
    assert together(2, work) == [
        (bad, "the training data cannot be read on another worker", asked), (bad, "7 of 9 rows are broken", asked),
    ]  # fmt: skip


def networks(rank: int) -> nn.ModuleDict:
    torch.manual_seed(rank)
    return nn.ModuleDict({"one": nn.Linear(3, 2), "other": nn.Linear(2, 2, bias=False)})


def test_gradients_are_averaged_and_values_added_up_while_something_else_is_done() -> None:
    """Oracle: the mean of the gradients by hand; a parameter that a worker has no gradient of counts as 0 there."""
    torch.manual_seed(7)
    grads = [[torch.randn(2, 3), torch.randn(2), torch.randn(2, 2)] for _ in range(3)]
    grads[1][2] = torch.zeros(2, 2)

    def work(context: Member) -> Any:
        parameters = [*networks(0).parameters()]
        for number, (parameter, grad) in enumerate(zip(parameters, grads[context.rank], strict=True)):
            parameter.grad = None if (context.rank, number) == (1, 2) else grad.clone()
        arrived = begun(context, parameters, torch.tensor([1.0, float(context.rank)]))
        assert context.begun == 1, "one exchange"
        return arrived().tolist(), [parameter.grad for parameter in parameters]

    wanted = [torch.stack([grads[rank][i] for rank in range(3)]).mean(0) for i in range(3)]
    for total, found in together(3, work):
        assert total == [3.0, 3.0]
        for one, mean in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, mean)


def test_a_parameter_without_a_gradient_anywhere_has_none_afterwards() -> None:
    """A zero would make the optimizer decay it, and go on with its momentum, on several workers but not on one."""

    def work(context: Member) -> Any:
        first, second = parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
        if context.rank == 0:
            first.grad = torch.tensor([2.0, 4.0])
        total = begun(context, parameters, torch.tensor([1.0]))()
        return total.tolist(), None if first.grad is None else first.grad.tolist(), second.grad

    assert together(2, work) == [([2.0], [1.0, 2.0], None)] * 2


@pytest.mark.parametrize("images", [3, 4])
def test_agreement_of_gradients_is_that_of_the_same_sets_on_one_worker(images: int) -> None:
    """Three images on two workers are a set on one and two on the other, as they are three sets alone."""
    recipe = Recipe(
        pruners=("diffprune",), steps=1, images=images, questions=1, calibration_images=2, validate_every=0, workers=1,
        budgets=("Keep(32)",),
    )  # fmt: skip
    built = ScorerTrainer(
        Member(Group(1), 0), load("embedded", device="cpu"), recipe, registry.make("pruners", recipe.pruners[0]), 0
    )

    def work(context: Member) -> float:
        trainer = copy.copy(built)
        trainer.context = context
        return trainer.grad_cosine(next(batches(trainer)), 0)

    (alone,) = together(1, work)
    assert together(2, work) == [pytest.approx(alone, abs=1e-4)] * 2


def test_alone_gradients_stay_what_they_are() -> None:
    (parameter,) = parameters = [nn.Parameter(torch.ones(2))]
    parameter.grad = grad = torch.tensor([1.0, 2.0])
    assert begun(Member(Group(1), 0), parameters, torch.tensor([4.0]))().tolist() == [4.0]
    assert parameter.grad is grad


def test_all_workers_begin_with_the_numbers_of_the_first() -> None:
    made = [networks(rank) for rank in range(2)]
    first = {name: value.clone() for name, value in made[0].state_dict().items()}

    def work(context: Member) -> dict[str, Tensor]:
        alike(context, made[context.rank])
        return made[context.rank].state_dict()

    for found in together(2, work):
        assert all(torch.equal(found[name], first[name]) for name in first)


def test_whether_to_end_is_the_same_on_all() -> None:
    class Files:
        remote = False

        def __init__(self, ending: bool) -> None:
            self.asked = ending

        def ending(self) -> bool:
            return self.asked

    def work(context: Member) -> list[bool]:
        context.files = Files(context.rank == 1)  # type: ignore[assignment]
        begun = context.begin_ending()
        context.files.asked = False  # type: ignore[attr-defined]
        return [begun(), context.begin_ending()()]

    assert together(2, work) == [[True, False], [True, False]]
