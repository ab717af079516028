"""The path: whatever is removed, the model computes what it would have computed had those tokens been hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Budget, parse
from diffprune.core.pruner import Pruner
from diffprune.core.site import ENCODED, Cut
from diffprune.core.tokens import VisualTokens
from diffprune.core.vlm import Prompts
from diffprune.embedded.vlm import build
from diffprune.models.llava import Llava
from diffprune.vlm.attention import decoder_attention, masked_softmax

NUM = 144
BUDGETS = ("Share(1/3)", "Keep(7)", "Keep(1)", "Above(0.5)", "Above(9, least=3)")


@pytest.fixture(scope="module")
def vlm() -> Llava:
    """A random model of the embedded shape; ids are made by hand, so it needs no tokenizer."""
    tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda rows, **_: [" ".join(map(str, r.tolist())) for r in rows])
    model = build(0)
    torch.manual_seed(1)
    for parameter in model.parameters():  # sharper than the usual initialisation, so that every token matters
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return Llava(model.eval().requires_grad_(False), SimpleNamespace(tokenizer=tokenizer, image_processor=None), "random")


@pytest.fixture(scope="module")
def batch(vlm: Llava) -> tuple[Prompts, dict[str, torch.Tensor]]:
    """Three rows of different length, left-padded, and three images."""
    torch.manual_seed(2)
    longest, image = 18 + NUM, vlm.model.config.image_token_id
    ids = torch.randint(image + 1, vlm.model.config.text_config.vocab_size, (3, longest))
    mask, slots, question = (
        torch.ones_like(ids),
        torch.zeros(3, longest, dtype=torch.bool),
        torch.zeros(3, longest, dtype=torch.bool),
    )
    for row, padding in enumerate((0, 3, 5)):
        mask[row, :padding], ids[row, :padding] = 0, 0
        slots[row, padding + 4 : padding + 4 + NUM] = True
        question[row, padding + 4 + NUM :] = True
    ids[slots] = image
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return Prompts(ids, mask, positions, slots, question), {"pixel_values": torch.randn(3, 3, 96, 96)}


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


def method(vlm: Llava, spelling: str, batch: tuple[Prompts, dict[str, torch.Tensor]]) -> tuple[Pruner, VisualTokens]:
    pruner = registry.load("pruners", spelling)
    tokens = vlm.encode(batch[1], pruner.needs)
    if hasattr(pruner, "build"):
        torch.manual_seed(3)
        pruner.build(pruning.with_question(vlm, batch[0], tokens)).eval()
    return pruner, tokens


def rows(prompts: Prompts, index: int) -> Prompts:
    """One row alone, without its padding."""
    start = int((prompts.attention_mask[index] == 0).sum())
    return Prompts(
        *(
            getattr(prompts, n)[index : index + 1, start:]
            for n in ("input_ids", "attention_mask", "position_ids", "slots", "question")
        )
    )


def hidden(vlm: Llava, prompts: Prompts, tokens: VisualTokens, pruner: Pruner, budget: Budget) -> torch.Tensor:
    """Oracle: the full-length run with the removed columns masked, same positions."""
    full = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), parse("Share(1)"))
    kept = pruning.select(vlm, prompts, tokens, pruner, budget).valid
    mask = full.prompts.attention_mask.clone()
    mask[full.prompts.slots] = kept.flatten().long()
    return pruning.forward(vlm, replace(full, prompts=replace(full.prompts, attention_mask=mask))).logits


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "spelling", ["random(seed=1)", "attention", "diffprune", "diffprune(question_aware=True)", "gumbel_keepdrop"]
)
def test_removing_equals_hiding(vlm: Llava, batch, spelling: str, budget: str) -> None:
    pruner, tokens = method(vlm, spelling, batch)
    packed = pruning.shrink(vlm, batch[0], tokens, pruner, parse(budget))
    short = pruning.forward(vlm, packed, logits_to_keep=1).logits
    torch.testing.assert_close(short[:, -1], hidden(vlm, batch[0], tokens, pruner, parse(budget))[:, -1], rtol=0, atol=1e-5)
    assert packed.prompts.input_ids.shape[1] == int((packed.kept + (batch[0].attention_mask.sum(1) - NUM)).max())
    assert packed.features.shape[0] == int(packed.kept.sum()) == int(packed.prompts.slots.sum())


def test_a_full_budget_is_the_models_own_run_token_for_token(vlm: Llava, batch) -> None:
    prompts, pixels = batch
    _, tokens = method(vlm, "unpruned", batch)
    packed = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "grid"), parse("Share(1)"))
    own = vlm.model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        **pixels,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )[:, prompts.input_ids.shape[1] :]
    texts, lengths = pruning.answer(vlm, packed, 8)
    assert texts == vlm.processor.tokenizer.batch_decode(own) and all(1 <= n <= 8 for n in lengths)
    logits = vlm.model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, **pixels).logits[:, -1]
    torch.testing.assert_close(pruning.forward(vlm, packed).logits[:, -1], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_batch_equals_one_by_one(vlm: Llava, batch, budget: str) -> None:
    pruner, tokens = method(vlm, "diffprune(question_aware=True)", batch)
    together = pruning.forward(vlm, pruning.shrink(vlm, batch[0], tokens, pruner, parse(budget))).logits[:, -1]
    for i in range(3):
        alone = pruning.shrink(vlm, rows(batch[0], i), tokens[torch.tensor([i])], pruner, parse(budget))
        torch.testing.assert_close(pruning.forward(vlm, alone).logits[0, -1], together[i], rtol=0, atol=1e-5)


def test_the_cache_holds_what_is_left_and_equals_recomputation(vlm: Llava, batch) -> None:
    pruner, tokens = method(vlm, "random", batch)
    packed = pruning.shrink(vlm, batch[0], tokens, pruner, parse("Keep(9)"))
    out = pruning.forward(vlm, packed, use_cache=True)
    longest = int((packed.kept + batch[0].attention_mask.sum(1) - NUM).max())
    assert out.past_key_values.get_seq_length() == longest
    token = out.logits[:, -1:].argmax(-1)
    mask = torch.cat([packed.prompts.attention_mask, torch.ones_like(token)], 1)
    position = packed.prompts.position_ids[:, -1:] + 1
    cached = vlm.model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=out.past_key_values).logits
    longer = replace(
        packed.prompts, input_ids=torch.cat([packed.prompts.input_ids, token], 1), attention_mask=mask,
        position_ids=torch.cat([packed.prompts.position_ids, position], 1),
    )  # fmt: skip
    again = pruning.forward(vlm, replace(packed, prompts=longer)).logits
    torch.testing.assert_close(cached[:, -1], again[:, -1], rtol=0, atol=1e-5)


def test_survivors_keep_their_positions(vlm: Llava, batch) -> None:
    pruner, tokens = method(vlm, "grid", batch)
    packed = pruning.shrink(vlm, batch[0], tokens, pruner, parse("Keep(12)"))
    for row in range(3):
        kept = pruning.select(vlm, batch[0], tokens, pruner, parse("Keep(12)")).valid[row].nonzero().squeeze(1)
        assert packed.prompts.position_ids[row][packed.prompts.slots[row]].tolist() == (kept + 4).tolist()


def test_without_an_image_nothing_but_text_is_left(vlm: Llava, batch) -> None:
    packed = pruning.blind(batch[0])
    assert packed.prompts.input_ids.shape[1] == 18 and not packed.prompts.slots.any() and not packed.kept.any()
    assert torch.isfinite(pruning.forward(vlm, packed).logits[packed.prompts.attention_mask.bool()]).all()


def test_replaced_keeps_every_slot_and_changes_only_the_others(vlm: Llava, batch) -> None:
    pruner, tokens = method(vlm, "replaced(random(seed=4))", batch)
    chosen = pruner.inner.select(tokens, Cut(ENCODED, parse("Keep(5)"))).keep
    answer = pruner.select(tokens, Cut(ENCODED, parse("Keep(5)")))
    assert answer.keep.all() and torch.equal(answer.features[chosen], tokens.features[chosen])
    torch.testing.assert_close(answer.features[0][~chosen[0]][0], tokens.features[0].mean(0))


def test_masked_softmax_is_attention_at_one_and_removal_at_zero(vlm: Llava, batch) -> None:
    """Oracle: all ones is fused attention; zeros equal hiding those columns (a hidden token still sees itself)."""
    _, tokens = method(vlm, "unpruned", batch)
    full = pruning.shrink(vlm, batch[0], tokens, registry.load("pruners", "unpruned"), parse("Share(1)"))
    plain = pruning.forward(vlm, full).logits[:, -1]
    retention = torch.ones(full.prompts.input_ids.shape)
    with decoder_attention(vlm.model, "masked_softmax"):
        same = pruning.forward(vlm, full, retention=retention).logits[:, -1]
        pruner, tokens = method(vlm, "random(seed=5)", batch)
        kept = pruner.select(tokens, Cut(ENCODED, parse("Keep(20)"))).keep
        retention[full.prompts.slots] = kept.flatten().float()
        dropped = pruning.forward(vlm, full, retention=retention).logits[:, -1]
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(dropped, hidden(vlm, batch[0], tokens, pruner, parse("Keep(20)"))[:, -1], rtol=0, atol=1e-4)
    assert vlm.model.config.text_config._attn_implementation == "sdpa"


def test_masked_softmax_gives_dropped_tokens_gradient() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(6)
        query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
        retention = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], requires_grad=True)
        masked_softmax(torch.nn.Module(), query, key, value, None, retention=retention)[0].square().sum().backward()
        assert retention.grad is not None and retention.grad[0, 1].abs() > 1e-6 and retention.grad[0, 3].abs() > 1e-6
