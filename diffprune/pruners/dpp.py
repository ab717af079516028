"""A ranking that keeps no near-duplicates: a determinantal point process weighted by a method's scores (arXiv 2506.10967).

What CDPruner does with the relevance of tokens to a question, done with the scores of any method, learnt ones above all. A scorer
that sees every token by itself gives near-duplicates nearly the same score, so the best by score are often several of one thing.
"""

from __future__ import annotations

from diffprune.core.budget import Budget
from diffprune.core.pruner import Pruner, Reference, ScorePruner
from diffprune.core.site import Cut, Plan
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import Shape
from diffprune.pruners._determinantal import checked, determinantal


class DPP(Pruner):
    """`dpp(diffprune)`: greedy MAP of the kernel e^(w s_i) cos(x_i, x_j) e^(w s_j) in place of the best scores s.

    Scores have unit deviation in each image. The kernel is CDPruner's, with e^(w s) for its relevance, the greedy choice that of
    arXiv 1709.05135, Algorithm 1; that a learnt score takes this place is our combination. Nothing is trained for it: the scorer is
    that of the method inside. Budgets are counts; a threshold has none to fill.

    method: that ranks tokens by a score.
    weight: w of a standard deviation of scores; the larger, the less diversity counts.

    Raises:
        ValueError: the method inside does not rank tokens, or no such weight.
    """

    label = "DPP"
    reference = Reference(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", "2506.10967"
    )

    def __init__(self, method: Pruner, weight: float = 0.5) -> None:
        if not isinstance(method, ScorePruner):
            raise ValueError(f"dpp weighs diversity by scores, but {method.label} does not rank tokens by a score")
        self.ranking, self.inner, self.weight = method, method, checked(weight, "dpp(weight")
        self.kind, self.needs, self.slack = method.kind, method.needs, method.slack  # type: ignore[misc]

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return self.ranking.cuts(budget, shape)

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        return determinantal(tokens, self.ranking.ordered(tokens), self.weight, cut.budget)
