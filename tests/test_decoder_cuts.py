"""Cuts inside the decoder: the model computes what it would have computed had the tokens been hidden from that layer on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional

import diffprune
from diffprune import pruning
from diffprune.core import registry
from diffprune.core.budget import Above, Budget, Keep, Share
from diffprune.core.evidence import Evidence, EvidenceKind, Question, decoder_attention, decoder_features, decoder_keys
from diffprune.core.pruner import ScorePruner
from diffprune.core.site import ENCODED, Cut, Plan, Site, Stage
from diffprune.core.tokens import Selection, VisualTokens
from diffprune.core.vlm import VLM, Prompts, Shape
from diffprune.data.batch import packed_rows, rows
from diffprune.pruning.rows import longer
from diffprune.train.loss import answer_nll
from diffprune.vlm import tiny as parts
from diffprune.vlm.activation_checkpointing import decoder_layers, recomputed
from tests import test_sliding_windows as windowed
from tests.test_families import FAMILIES, IMAGES, QUESTIONS, close, own, pictures

LAYERS = 4
PLANS: dict[str, Callable[[], Plan]] = {
    "once": lambda: (_after(2, Keep(4)),),
    "thrice": lambda: (Cut(ENCODED, Share(0.8)), _after(1, Above(0.0, least=3)), _after(3, Share(0.5))),  # the second is ragged
}


def _after(layer: int, budget: Budget) -> Cut:
    return Cut(Site(Stage.DECODER, layer), budget)


class Staged(ScorePruner):
    """Cuts where it is told to, by a score of the token's features alone."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def cuts(self, budget: Budget, shape: Shape) -> Plan:
        return self.plan

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        weight = torch.randn(tokens.features.shape[-1], generator=torch.Generator().manual_seed(9))
        return tokens.features.float() @ weight


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def deep(family: str) -> VLM:
    with torch.inference_mode(False), parts.sized(64, LAYERS):
        made: VLM = registry.find("models", family).tiny()
    assert made.shape.layers == LAYERS
    return made


@cache
def batch(family: str) -> tuple[VLM, Prompts, dict[str, torch.Tensor], VisualTokens]:
    with torch.inference_mode():
        vlm = deep(family)
        pixels = vlm.pixels(pictures())
        tokens = vlm.encode(pixels)
        prompts = vlm.prompts(QUESTIONS, tokens.present.sum(1).tolist(), tokens.layout, IMAGES)
    return vlm, prompts, pixels, tokens


@contextmanager
def hiding(vlm: VLM, live: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Oracle: rows of full length all the way; from layer l (from 0) on, only columns `live[l]` [B S] of the prompt may be seen."""

    def hook(number: int, columns: torch.Tensor) -> Any:
        def before(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            states, mask = args[0] if args else given["hidden_states"], given.get("attention_mask")
            past, new = given.get("past_key_values"), states.shape[1]
            length, offset = (new, 0) if past is None else past.get_mask_sizes(new, number)
            if mask is None:
                mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)[None, None]
            more = columns.new_ones(len(columns), max(0, offset + length - columns.shape[1]))
            seen = torch.cat([columns, more], 1)[:, None, None, offset : offset + length]
            narrow = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
            return args, {**given, "attention_mask": narrow}

        return before

    with ExitStack() as hooks:
        for number, layer in enumerate(decoder_layers(vlm.model)):
            seen = live[max(at for at in live if at <= number)]
            hooks.callback(layer.register_forward_pre_hook(hook(number, seen), with_kwargs=True).remove)
        yield


def chosen(vlm: VLM, packed: pruning.Packed) -> dict[int, VisualTokens]:
    """What a forward pass leaves after each cut, by the first layer behind it."""
    with pruning.running(vlm, packed) as cuts:
        vlm.model(**_inputs(vlm, packed), use_cache=False)
        assert cuts is not None
        return {number: stage.tokens for number, stage in cuts.stages.items()}


def _inputs(vlm: VLM, packed: pruning.Packed) -> dict[str, Any]:
    made = pruning.decoder_inputs(vlm, packed)
    return made | {"position_ids": made["position_ids"] + vlm.position_offset}


def columns(prompts: Prompts, tokens: VisualTokens, left: VisualTokens) -> torch.Tensor:
    """[B S] bool: the columns of full rows that a layer may see."""
    return prompts.attention_mask.bool().masked_scatter(prompts.slots, left.present[tokens.present])


def whole(vlm: VLM, prompts: Prompts, tokens: VisualTokens) -> dict[str, Any]:
    """Inputs of full rows, positions included."""
    full = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Share(1))
    return pruning.decoder_inputs(vlm, full)


def live_of(vlm: VLM, prompts: Prompts, tokens: VisualTokens, pruner: Staged) -> dict[int, torch.Tensor]:
    """Columns seen from layer 0 (after cuts before the decoder) and from behind every cut on."""
    packed = pruning.shrink(vlm, prompts, tokens, pruner, Keep(1))
    left = {0: pruning.select(vlm, prompts, tokens, pruner, Keep(1)), **chosen(vlm, packed)}
    return {number: columns(prompts, tokens, one) for number, one in left.items()}


def lengths(live: Mapping[int, torch.Tensor], layers: int = LAYERS) -> list[int]:
    """Cached entries of every layer after prefill: those of the longest row."""
    return [int(live[max(at for at in live if at <= number)].sum(1).max()) for number in range(layers)]


@pytest.mark.parametrize(("plan", "attention"), [("once", "sdpa"), ("thrice", "sdpa"), ("thrice", "eager")])
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_inside_equals_hiding_from_that_layer_on(family: str, plan: str, attention: str) -> None:
    vlm, prompts, _, tokens = batch(family)
    before = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation(attention)
    try:
        pruner = Staged(PLANS[plan]())
        packed = pruning.shrink(vlm, prompts, tokens, pruner, Keep(1))
        output = pruning.forward(vlm, packed, use_cache=True)
        live = live_of(vlm, prompts, tokens, pruner)
        inputs = whole(vlm, prompts, tokens)
        with hiding(vlm, live):
            wanted = vlm.model(**inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset}).logits
    finally:
        vlm.model.set_attn_implementation(before)
    last = live[max(live)]
    for row in range(len(prompts)):
        here = columns(packed.prompts, packed.inside.tokens, chosen(vlm, packed)[max(live)])[row]
        close(output.logits[row][here], wanted[row][last[row]])
    held = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert held == lengths(live), "each layer caches what its cuts left"
    assert held[-1] < held[0]


class Sparing(Staged):
    """Takes nothing from the image in the longest row, so that rows stay as long as they were."""

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        keep = super().select(tokens, cut).keep
        keep[2] = tokens.valid[2]
        return Selection(keep)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_rows_as_long_as_before_are_cut_all_the_same(family: str) -> None:
    vlm = deep(family)
    pixels = vlm.pixels(pictures()[:3])
    tokens = vlm.encode(pixels)
    prompts = vlm.prompts(["a", "b", "which of the two is it " * 12], tokens.present.sum(1).tolist(), tokens.layout)
    pruner = Sparing((_after(1, Keep(4)), _after(3, Keep(2))))
    output = pruning.forward(vlm, pruning.shrink(vlm, prompts, tokens, pruner, Keep(1)), use_cache=True)
    inputs = whole(vlm, prompts, tokens)
    with hiding(vlm, live := live_of(vlm, prompts, tokens, pruner)):
        wanted = vlm.model(**inputs | {"position_ids": inputs["position_ids"] + vlm.position_offset}).logits[:, -1]
    close(output.logits[:, -1], wanted)
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == lengths(live) == [prompts.slots.shape[1]] * LAYERS
    assert all(live[at][:2].sum() < live[0][:2].sum() for at in (1, 3))


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
}


def generate(vlm: VLM, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    skip = vlm.model.config.image_token_id
    made: torch.Tensor = vlm.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, suppress_tokens=[skip], **options)
    return made


@pytest.mark.parametrize(("plan", "mode"), [("once", "greedy"), *(("thrice", mode) for mode in MODES)])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_inside_pruned_equals_hiding(family: str, mode: str, plan: str) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    pruner = Staged(PLANS[plan]())
    live = live_of(vlm, prompts, tokens, pruner)
    given = own(vlm, prompts, pixels)
    with diffprune.pruned(vlm.model, pruner, Keep(1)) as session:
        found = generate(vlm, given, **MODES[mode])
    where = whole(vlm, prompts, tokens)["position_ids"]
    repeated = {at: seen.repeat_interleave(MODES[mode].get("num_beams", 1), 0) for at, seen in live.items()}
    with hiding(vlm, repeated):
        wanted = generate(vlm, given | {"position_ids": where}, **MODES[mode])
    assert torch.equal(found, wanted)
    assert session.selection is not None
    assert torch.equal(columns(prompts, tokens, replace(tokens, valid=session.selection.keep)), live[max(live)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_one_by_one_and_answers_equal_hiding(family: str) -> None:
    vlm, prompts, pixels, tokens = batch(family)
    pruner = Staged(PLANS["thrice"]())
    packed = pruning.shrink(vlm, prompts, tokens, pruner, Keep(1))
    together = pruning.forward(vlm, packed, logits_to_keep=1).logits[:, -1]
    texts, _ = pruning.answer(vlm, packed, 5)
    first = 0
    for row, count in enumerate(IMAGES):
        alone = vlm.encode(vlm.part(pixels, first, first + count))
        ask = vlm.prompts(QUESTIONS[row : row + 1], alone.present.sum(1).tolist(), alone.layout, [count])
        one = pruning.shrink(vlm, ask, alone, pruner, Keep(1))
        close(pruning.forward(vlm, one, logits_to_keep=1).logits[0, -1], together[row])
        assert pruning.answer(vlm, one, 5)[0] == texts[row : row + 1]
        first += count
    live = live_of(vlm, prompts, tokens, pruner)
    with hiding(vlm, live):
        full = pruning.shrink(vlm, prompts, tokens, registry.load("pruners", "unpruned"), Share(1))
        assert pruning.answer(vlm, full, 5)[0] == texts
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder_layers(vlm.model)), "nothing stays behind"
    assert not vlm.model._forward_pre_hooks and not vlm.model.get_decoder().norm._forward_pre_hooks


@pytest.mark.parametrize(("plan", "mode"), [("inside", "greedy"), *(("before and inside", mode) for mode in MODES)])
@pytest.mark.parametrize("name", windowed.MAKERS)
def test_sliding_windows_are_measured_in_the_full_rows(name: str, plan: str, mode: str) -> None:
    """Rows longer than the window of the decoder, whose caches hold windows by index."""
    vlm, prompts, pixels, tokens = windowed.batch(name)
    first = () if plan == "inside" else (Cut(ENCODED, Share(0.7)),)
    pruner = Staged((*first, _after(1, Keep(5))))
    live = live_of(vlm, prompts, tokens, pruner)
    given = own(vlm, prompts, pixels)
    with diffprune.pruned(vlm.model, pruner, Keep(1)):
        found = generate(vlm, given, **MODES[mode])
        logits = vlm.model(**given).logits[:, -1]
    where = whole(vlm, prompts, tokens)["position_ids"]
    repeated = {at: seen.repeat_interleave(MODES[mode].get("num_beams", 1), 0) for at, seen in live.items()}
    with hiding(vlm, repeated):
        assert torch.equal(found, generate(vlm, given | {"position_ids": where}, **MODES[mode]))
    with hiding(vlm, live):
        close(logits, vlm.model(**given | {"position_ids": where + vlm.position_offset}).logits[:, -1])


# --- evidence ---------------------------------------------------------------------------------------------------------

ROWS = (
    decoder_attention(), decoder_attention(0), decoder_attention(None), decoder_attention(-1, "text"),
    decoder_attention(None, "each"),
)  # fmt: skip
STATES = (
    decoder_keys(), decoder_keys(None), decoder_keys(-1, "text"),
    decoder_features(), decoder_features(0), decoder_features(None, "text"),
)  # fmt: skip


class Sees(Staged):
    """Notes what it is given at each cut."""

    def __init__(self, plan: Plan, *needs: Evidence) -> None:
        super().__init__(plan)
        self.needs, self.seen = frozenset(needs), {}

    def select(self, tokens: VisualTokens, cut: Cut) -> Selection:
        self.seen[cut.site.layer] = tokens
        return super().select(tokens, cut)


def at_tokens(values: torch.Tensor, prompts: Prompts, tokens: VisualTokens) -> torch.Tensor:
    """[B S ...] of full rows -> [I N ...] at the tokens of their images, row by row."""
    found = values.new_zeros(*tokens.valid.shape, *values.shape[2:])
    taken = [list(row[slots]) for row, slots in zip(values, prompts.slots, strict=True)]
    image = 0
    for row, count in enumerate(IMAGES):
        for _ in range(count):
            for place in tokens.present[image].nonzero().squeeze(1).tolist():
                found[image, place] = taken[row].pop(0)
            image += 1
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_is_what_the_layers_compute(family: str, attention: str) -> None:
    """Oracle: attentions, keys and hidden states of the model's own eager run, tokens of the first cut hidden for the second."""
    vlm, prompts, _, tokens = batch(family)
    pruner = Sees((_after(1, Keep(5)), _after(3, Keep(2))), *ROWS, *STATES)
    vlm.model.set_attn_implementation({"text_config": attention})
    try:
        packed = pruning.shrink(vlm, prompts, tokens, pruner, Keep(1))
        pruning.forward(vlm, packed)
        live = live_of(vlm, prompts, tokens, pruner)
        vlm.model.set_attn_implementation({"text_config": "eager"})
        inputs = whole(vlm, prompts, tokens)
        inputs["position_ids"] = inputs["position_ids"] + vlm.position_offset
        with hiding(vlm, {0: live[0], 1: live[1]}):
            told, states = entering(vlm, inputs)
        with hiding(vlm, {0: live[0]}):
            plain, _ = entering(vlm, inputs)
    finally:
        vlm.model.set_attn_implementation({"text_config": "sdpa"})
    for layer, seen in pruner.seen.items():
        for key in (*ROWS, *STATES):
            number = layer if key.layer is None else key.layer if key.layer >= 0 else layer + key.layer
            run = plain if number == layer == 1 else told  # before its own cut a layer sees every token
            wanted = states[number] if key.kind is EvidenceKind.DECODER_FEATURES else _wanted(key, run, number, prompts)
            found = seen.evidence[key]
            if isinstance(found, Question):
                for image, row in enumerate(row for row, count in enumerate(IMAGES) for _ in range(count)):
                    close(found.embedding[image][found.valid[image]], wanted[row][prompts.question[row]])
            else:
                close(found[seen.valid], at_tokens(wanted, prompts, tokens)[seen.valid])


def entering(vlm: VLM, inputs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    """(output with attention weights and cache, hidden states that enter each layer)."""
    states: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for layer in decoder_layers(vlm.model):
            hooks.callback(layer.register_forward_pre_hook(lambda _, args: states.append(args[0])).remove)
        return vlm.model(**inputs, output_attentions=True, use_cache=True), states


def _wanted(key: Evidence, run: Any, number: int, prompts: Prompts) -> torch.Tensor:
    if key.kind is EvidenceKind.DECODER_KEYS:
        return run.past_key_values.layers[number].keys.transpose(1, 2).flatten(2)
    weights = run.attentions[number].mean(1)
    if key.queries == "last":
        return weights[:, -1]
    longest = int(prompts.question.sum(1).max())
    asked = prompts.question[:, -longest:]  # the question stands at the end of these rows
    each = (weights[:, -longest:] * asked[..., None]).transpose(1, 2)
    return each if key.queries == "each" else each.sum(2) / asked.sum(1)[:, None]


class Watched(Staged):
    """Cuts by the attention the last token of the prompt pays."""

    needs = frozenset({decoder_attention()})

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.given(decoder_attention())


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_the_choice_is_made_by_the_prompt_alone(family: str) -> None:
    """Generation without a cache runs over ever longer rows, whose last token is no longer the prompt's; so do training rows."""
    vlm, prompts, pixels, tokens = batch(family)
    pruner = Watched((_after(1, Keep(3)), _after(2, Keep(2))))
    with diffprune.pruned(vlm.model, pruner, Keep(1)):
        made = generate(vlm, own(vlm, prompts, pixels), **MODES["greedy"])
        assert torch.equal(generate(vlm, own(vlm, prompts, pixels), **MODES["no cache"]), made)
    packed = pruning.shrink(vlm, prompts, tokens, pruner, Keep(1))
    kept = chosen(vlm, packed)
    with pruning.running(vlm, packed):
        again = generate(vlm, pruning.decoder_inputs(vlm, packed), **MODES["no cache"])
    assert torch.equal(again[:, -5:], made[:, -5:])
    said = made[:, -5:]
    taught = longer(packed.prompts, torch.ones_like(said, dtype=torch.bool))
    labels = torch.cat([torch.full_like(prompts.input_ids, -100), said], 1)
    ids = torch.cat([packed.prompts.input_ids, said], 1)
    answered = replace(packed, prompts=replace(taught, input_ids=ids, labels=labels))
    for layer, left in chosen(vlm, answered).items():
        assert torch.equal(left.valid, kept[layer].valid), "the answer is not looked at"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_what_is_left_last_predicts_what_follows_a_picture(family: str, plan: str) -> None:
    """Rows that end with their picture, whose last token may be removed: it gave the zero vector, which predicts token 0. Oracle:
    the full row with the removed columns hidden, read at the last place that is left up to each."""
    vlm = deep(family)
    pixels = vlm.pixels(pictures()[:2])
    sizes = vlm.encode(pixels).present.sum(1).tolist()
    slots = vlm.prompts(["", ""], sizes, vlm.layout(pixels)).input_ids
    end = (slots == vlm.model.config.image_token_id).nonzero()[:, 1].max() + 1
    ids = torch.cat([torch.tensor([[40, 41], [42, 43]]), slots[:, :end]], 1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    _, prompts = vlm.read({**pixels, "input_ids": ids, "attention_mask": mask})
    tokens, pruner = vlm.encode(pixels), Staged(PLANS[plan]())
    with hiding(vlm, live := live_of(vlm, prompts, tokens, pruner)):
        wanted = vlm.model(**whole(vlm, prompts, tokens)).logits
    with diffprune.pruned(vlm.model, pruner, Keep(1)):
        found = vlm.model(**own(vlm, prompts, pixels)).logits
    last, enter = live[max(live)], live[0]
    for row in range(2):
        places = [int(last[row, : place + 1].nonzero().max()) for place in enter[row].nonzero()[:, 0].tolist()]
        close(found[row, -len(places) :], wanted[row, places])
    assert bool((enter & ~last).any()) and (family == "llava_next" or not last[:, -1].all()), "something last is removed"


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_candidates_and_later_turns_see_what_was_left(family: str) -> None:
    """Prompt lookup checks several tokens at once and crops the cache; a second call of generate goes on with the cache."""
    vlm = deep(family)
    pixels = vlm.pixels(pictures()[:1])
    tokens = vlm.encode(pixels)
    prompts = vlm.prompts(["aa aa aa aa aa"], tokens.counts.tolist(), tokens.layout)
    pruner, given = Watched((_after(1, Keep(4)), _after(3, Keep(2)))), own(vlm, prompts, pixels)
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [vlm.model.config.image_token_id]}
    with diffprune.pruned(vlm.model, pruner, Keep(1)):
        plain = vlm.model.generate(**given, **options)
        assert torch.equal(vlm.model.generate(**given, **options, prompt_lookup_num_tokens=3), plain)
        first = vlm.model.generate(**given, **options, return_dict_in_generate=True)
        asked = torch.cat([first.sequences, torch.tensor([[30, 31, 32]])], 1)
        mask = torch.ones_like(asked)
        second = vlm.model.generate(input_ids=asked, attention_mask=mask, past_key_values=first.past_key_values, **options)
    live = live_of(vlm, prompts, tokens, pruner)
    more = {name: functional.pad(given[name], (0, asked.shape[1] - given[name].shape[1])) for name in vlm.token_inputs(prompts)}
    with hiding(vlm, live):
        wanted = vlm.model.generate(**given | more | {"input_ids": asked, "attention_mask": mask}, **options)
    assert torch.equal(second, wanted)


def test_a_loss_reaches_the_tokens_through_cuts_also_where_layers_are_computed_again() -> None:
    vlm = deep("llava")
    pixels = vlm.pixels(pictures()[:2])
    labelled = rows(vlm, [[("what?", "a cat")], [("how many?", "two of them")]], pixels)
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        encoded = vlm.encode({name: value.clone() for name, value in pixels.items()})
        for again in (False, True):
            features = encoded.features.detach().clone().requires_grad_(True)
            pruner = Watched((_after(1, Keep(5)), _after(3, Keep(2))))
            packed = pruning.shrink(vlm, labelled, replace(encoded, features=features), pruner, Keep(1))
            with recomputed(vlm.model) if again else nullcontext():
                loss = answer_nll(vlm, packed)
                loss.backward()
            assert features.grad is not None
            found.append((loss.detach(), features.grad))
    (plain, gradient), (again_loss, again_gradient) = found
    assert torch.equal(plain, again_loss) and torch.equal(gradient, again_gradient)
    assert (gradient.abs().sum(-1) > 0).all(), "in the first layers every token counts"


def test_what_cannot_be_cut_inside_is_refused() -> None:
    vlm, prompts, _, tokens = batch("llava")

    def refused(reason: str, plan: Plan, *needs: Evidence, **options: Any) -> None:
        with pytest.raises(ValueError, match=reason):
            pruning.shrink(vlm, prompts, tokens, Sees(plan, *needs), Keep(1), **options)

    refused("after decoder layer 4, which saves nothing in a decoder of 4 layers", (_after(4, Keep(2)),))
    refused(
        "by attention in the decoder, layer 2, from the last token, which is not known there",
        (_after(2, Keep(2)),),
        decoder_attention(2),
    )
    refused("2 layers before the cut, from the last token, which is not known there", (_after(1, Keep(2)),), decoder_attention(-2))
    refused("tokens keep their positions", (_after(1, Keep(2)),), positions="compact")
    with (
        pytest.raises(ValueError, match="tokens keep their positions"),
        diffprune.pruned(vlm.model, Sees((_after(1, Keep(2)),)), Keep(1), positions="compact"),
    ):
        pass
    with pytest.raises(
        ValueError, match="llava cannot give attention in the decoder, layer 9, from the last token: its decoder has the"
    ):
        vlm.check_evidence({decoder_attention(9)})


def test_attention_inside_flash_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = deep("llava")
    monkeypatch.setattr(vlm.model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="read beside sdpa or eager or masked_softmax, not flash_attention_2"):
        vlm.check_evidence({decoder_attention()})
    vlm.check_evidence({decoder_features()})


def test_packed_training_rows_are_refused() -> None:
    vlm = deep("llava")
    pixels = vlm.pixels(pictures()[:1])
    many = packed_rows(vlm, [[("what?", "a cat"), ("how many?", "two")]], pixels)
    with pytest.raises(ValueError, match="rows of one question each"):
        pruning.shrink(vlm, many, vlm.encode(pixels), Staged((_after(1, Keep(2)),)), Keep(1))
