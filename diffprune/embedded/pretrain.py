"""How the embedded VLM was made: the vision tower first, then projector and language model. Steps, never seconds.

Tower: dense labels on every patch and a caption on the pooled CLS token. The CLS token learns what a caption would name -
everything salient, whether or not it is ever asked about: shapes, colours, whether there is a sign and its plate colour, decoys,
clutter - and no fine detail (digits, positions, counts). This was decided before any pruning result was seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from . import questions, vlm, world


@dataclass(frozen=True)
class Tower:
    """The tower's recipe: Muon on matrices, AdamW on the rest."""

    steps: int = 1800
    batch: int = 32
    muon: float = 3e-3
    adam: float = 2e-3
    warmup: int = 50


# --- the vision tower ------------------------------------------------------------------------------------------------


def scenes(seed: int, split: str = "train") -> Iterator[int]:
    """An endless stream of scene seeds of one split, drawn with `seed`."""
    r = np.random.default_rng([seed, 1])
    seeds = world.SPLITS[split]
    while True:
        yield from r.integers(seeds.start, seeds.stop, 4096).tolist()


class Labels(nn.Module):
    """Linear read-outs of the tower, thrown away after its training.

    Every patch: kind, colour, digit, quadrant of its object's centre, anchor. The pooled CLS token: the caption.
    """

    parts = (world.NUM_KINDS, len(world.COLORS), 10, 4, 1)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(self.parts))
        self.cls = nn.Linear(width, world.NUM_CAPTION)

    def forward(self, patches: Tensor, pooled: Tensor, batch: list[world.Scene]) -> tuple[Tensor, dict[str, float]]:
        """patches [B 144 D], pooled [B D] -> loss, held-out figures by name (shares of patches labelled right)."""
        kind, color, digit, quadrant, anchor = self.patch(self.norm(patches)).split(self.parts, -1)
        truth = {
            name: torch.from_numpy(np.stack([getattr(s, name) for s in batch]))
            for name in ("kind", "color", "digit", "quadrant", "anchor")
        }
        object_, number, colored = truth["quadrant"] >= 0, truth["digit"] >= 0, truth["color"] >= 0
        caption = torch.from_numpy(np.stack([s.caption() for s in batch]))
        parts = {
            "kind": (kind, truth["kind"], truth["kind"] >= 0, 1.0),
            "shape": (kind, truth["kind"], object_, 1.0),
            "color": (color, truth["color"], colored, 0.5),
            "digit": (digit, truth["digit"], number, 1.0),
            "quadrant": (quadrant, truth["quadrant"], object_, 0.5),
        }
        cls = F.binary_cross_entropy_with_logits(self.cls(pooled), caption)
        loss = cls + F.binary_cross_entropy_with_logits(anchor[colored][:, 0], truth["anchor"][colored].float())
        figures = {"cls": cls.item()}
        for name, (logits, label, where, weight) in parts.items():
            loss = loss + weight * F.cross_entropy(logits[where], label[where])
            figures[name] = (logits[where].argmax(-1) == label[where]).float().mean().item()
        figures["anchor"] = ((anchor[..., 0] > 0) == truth["anchor"])[colored].float().mean().item()
        return loss, figures


def optimisers(module: nn.Module, muon: float, adam: float, weight_decay: float = 0.02) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside layers, AdamW on embeddings, norms, biases and convolutions."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (matrices if p.ndim == 2 and "embed" not in name and "lm_head" not in name else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=muon, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.98), weight_decay=weight_decay),
    ]


def step(optimisers: list[torch.optim.Optimizer], parameters: Sequence[Tensor], loss: Tensor, scale: float) -> None:
    """One clipped update at `scale` times each optimiser's own learning rate."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * scale
        optimiser.step()
        optimiser.zero_grad()


def train_tower(
    model: LlavaForConditionalGeneration,
    seed: int,
    recipe: Tower,
    say: Callable[[str], None] = print,
    save: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train the model's vision tower in place; returns figures on 256 scenes of the calibration split."""
    torch.manual_seed(seed)
    tower = model.model.vision_tower
    labels = Labels(model.config.vision_config.hidden_size)
    both = nn.ModuleList([tower, labels]).train()
    opts, parameters = optimisers(both, recipe.muon, recipe.adam), list(both.parameters())
    seeds, start = scenes(seed), time.process_time()

    def see(batch: list[world.Scene]) -> tuple[Tensor, dict[str, float]]:
        out = tower(vlm.pixels([s.image for s in batch]), output_hidden_states=True)
        return labels(out.hidden_states[-1][:, 1:], out.pooler_output, batch)

    for i in range(recipe.steps):
        loss, figures = see([world.scene(next(seeds)) for _ in range(recipe.batch)])
        done = i / recipe.steps
        step(opts, parameters, loss, min(1, (i + 1) / recipe.warmup) * max(0.02, min(1, 1.6 * (1 - done))))
        if i % 100 == 0:
            shown = " ".join(f"{k} {v:.3f}" for k, v in figures.items())
            say(f"tower {i}/{recipe.steps} cpu {time.process_time() - start:.0f} s loss {loss.item():.3f} {shown}")
            if save is not None:
                save()
    tower.eval()
    held_out = scenes(seed, "calibration")
    with torch.no_grad():
        figures = see([world.scene(next(held_out)) for _ in range(256)])[1]
    say("tower held out " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    return figures


# --- projector and language model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Language:
    """The language model's recipe: packed questions over all visual tokens, a curriculum over scenes, a naming loss at depth."""

    steps: int = 7500
    pictures: int = 4  # per step
    questions: int = 12  # per picture
    text_only: int = 4  # further questions per row that come without a picture
    muon: float = 3e-3
    adam: float = 1.5e-3
    warmup: int = 60
    hold: float = 0.6  # share of the steps at the full learning rate; then linear to 3 %
    full_by: float = 0.1  # share of the steps after which every scene is of the full world
    bar: float = 0.25  # smoothed loss below which the next level begins
    naming: float = 0.5  # weight of the naming loss, falling linearly to 0 at `naming_until`
    naming_layer: int = 2
    naming_until: float = 0.7
    looking: float = 0.2  # weight of the share of attention spent on visual tokens
    looking_from: float = 0.5  # share of the steps from which that counts: after what to look for has been learnt


@torch.no_grad()
def prime(model: LlavaForConditionalGeneration, scale_by: Tensor) -> None:
    """Initial values: queries close to keys and values transposed to outputs, so tokens first attend to their like.

    scale_by: tower features [B, 144, D], by which the projector standardises its input.
    """
    language, projector = model.model.language_model, model.model.multi_modal_projector
    width = language.config.hidden_size
    sigma = width**-0.5
    language.embed_tokens.weight.normal_(0, 0.5)
    language.norm.weight.fill_(0.25)
    for layer in language.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj.weight.normal_(0, sigma)
        attention.k_proj.weight.copy_(attention.q_proj.weight + 0.2 * sigma * torch.randn(width, width))
        rotation = torch.linalg.qr(torch.randn(width, width))[0]
        attention.v_proj.weight.copy_(0.6 * rotation)
        attention.o_proj.weight.copy_(0.6 * rotation.T)
        mlp.gate_proj.weight.normal_(0, sigma)
        mlp.up_proj.weight.normal_(0, sigma)
        mlp.down_proj.weight.normal_(0, 0.5 * mlp.down_proj.in_features**-0.5)
    mean, std = scale_by.mean((0, 1)), scale_by.std((0, 1))
    first = torch.randn(width, len(mean)) * len(mean) ** -0.5 / std
    projector.linear_1.weight.copy_(first)
    projector.linear_1.bias.copy_(-(first @ mean))
    projector.linear_2.weight.normal_(0, 0.8 * sigma)
    projector.linear_2.bias.zero_()


def features(model: LlavaForConditionalGeneration, batch: list[world.Scene]) -> Tensor:
    """Tower output of a batch of scenes, CLS dropped, [B, 144, 96]."""
    with torch.no_grad():
        seen = model.model.vision_tower(vlm.pixels(s.image for s in batch), output_hidden_states=True)
    return seen.hidden_states[-1][:, 1:]


def names(batch: list[world.Scene]) -> Tensor:
    """The words that name each token, as shares of a whole, [B, 144, V]; all zero where nothing asked about is."""

    def one_hot(words: tuple[str, ...], index: np.ndarray) -> Tensor:
        table = torch.zeros(len(words) + 1, len(vlm.VOCABULARY))  # the last row, index -1, names nothing
        for row, word in enumerate(words):
            for part in word.split():
                table[row, vlm.WORD_ID[part]] = 1 / len(word.split())
        return table[torch.from_numpy(index)]

    kind = np.stack([s.kind for s in batch])
    shape = np.where((kind > 0) & (kind <= len(world.SHAPES)), kind - 1, -1)
    number = np.isin(kind, (world.TENS, world.UNITS))
    words = one_hot(world.SHAPES, shape) + one_hot(("sign",), np.where(number, 0, -1))
    words += one_hot(world.COLORS, np.stack([s.color for s in batch]))
    words += one_hot(world.DIGITS, np.stack([s.digit for s in batch]))
    words += one_hot(world.QUADRANTS, np.stack([s.quadrant for s in batch]))
    return words / words.sum(-1, keepdim=True).clamp_min(1)


class Curriculum:
    """Which level of the world the next step draws: up when the smoothed loss falls below the bar, or when its time has come."""

    def __init__(self, recipe: Language, seed: int) -> None:
        self.recipe, self.r = recipe, np.random.default_rng([seed, 3])
        self.level, self.since, self.current = 0, 0, True
        self.loss = float("nan")  # smoothed; below no bar until the first step has been seen

    def draw(self, done: float) -> int:
        """The level of the step at share `done`: the current one, or in a quarter of the steps an easier one."""
        due = min(world.FULL, int(done / self.recipe.full_by * (world.FULL + 1)))
        if self.level < world.FULL and (self.level < due or (self.since > 80 and self.loss < self.recipe.bar)):
            self.level, self.since = self.level + 1, 0
        self.current = done > self.recipe.full_by or self.level == 0 or self.r.random() < 0.75
        return self.level if self.current else int(self.r.integers(self.level))

    def saw(self, loss: float) -> None:
        self.since += 1
        if self.current:
            self.loss = 0.97 * self.loss + 0.03 * loss if self.loss == self.loss else loss


def naming_loss(model: LlavaForConditionalGeneration, hidden: Tensor, batch: list[world.Scene]) -> Tensor:
    """Hidden states [B, L, D] at object and sign tokens, read through the model's own head, must name what is there."""
    target = names(batch)
    named = target.sum(-1) > 0
    shown = model.model.language_model.norm(hidden[:, vlm.IMAGE_START : vlm.IMAGE_END][named])
    return -(F.log_softmax(model.lm_head(shown), -1) * target[named]).sum(-1).mean()


def looking(attentions: tuple[Tensor, ...], packed: vlm.Packed) -> Tensor:
    """Mean share of attention that goes to visual tokens (a visual token's own place aside), over layers, heads and places.

    Nothing in it tells one visual token from another. Made a small cost, it lets heads with nothing to read rest on the words
    before the picture, as in a pre-trained language model, and not on background tokens.
    """
    image = slice(vlm.IMAGE_START, vlm.IMAGE_END)
    asking = packed.segments > 0
    shares = []
    for a in attentions:  # [B H L L]
        by_text = a[..., image].sum(-1).mean(1)[asking]
        by_image = a[:, :, image, image].sum(-1) - a[:, :, image, image].diagonal(dim1=-2, dim2=-1)
        shares.append((by_text.mean() + by_image.mean()) / 2)
    return torch.stack(shares).mean()


def losses(
    model: LlavaForConditionalGeneration, batch: list[world.Scene], packed: vlm.Packed, naming_layer: int, look: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Given all visual tokens: cross entropy of the answers, the naming loss, the share of attention spent on looking.

    The last is zero unless asked for: it takes the slow attention that shows its weights.
    """
    language = model.model.language_model
    language.set_attn_implementation("eager" if look else "sdpa")
    mask = packed.mask()
    out = language(
        inputs_embeds=vlm.embed(model, packed, model.model.multi_modal_projector(features(model, batch))),
        attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e9) if look else mask,
        position_ids=packed.positions,
        use_cache=False,
        output_hidden_states=True,
        output_attentions=look,
    )
    language.set_attn_implementation("sdpa")
    said = packed.labels[:, 1:] >= 0
    answers = F.cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][said]), packed.labels[:, 1:][said])
    named = naming_loss(model, out.hidden_states[naming_layer], batch)
    return answers, named, looking(out.attentions, packed) if look else torch.zeros(())


def train_language(
    model: LlavaForConditionalGeneration,
    seed: int,
    recipe: Language,
    say: Callable[[str], None] = print,
    pause: Callable[[int], None] | None = None,
    every: int = 1000,
) -> None:
    """Train projector and language model in place on the frozen tower; `pause(step)` runs every so many steps."""
    torch.manual_seed(seed)
    seeds, r, curriculum = scenes(seed + 1000), np.random.default_rng([seed, 2]), Curriculum(recipe, seed)
    model.model.vision_tower.requires_grad_(False).eval()
    prime(model, features(model, [world.scene(next(seeds)) for _ in range(64)]))
    learning = nn.ModuleList([model.model.language_model, model.model.multi_modal_projector])
    parameters = list(learning.parameters())
    opts, start = optimisers(learning, recipe.muon, recipe.adam), time.process_time()
    for i in range(recipe.steps):
        done = i / recipe.steps
        level = curriculum.draw(done)
        batch = [world.scene(next(seeds), level) for _ in range(recipe.pictures)]
        packed = vlm.pack(
            [[asked[1:] for asked in questions.draw(s, r, recipe.questions)] for s in batch],
            [[asked[1:] for asked in questions.text_only(r, recipe.text_only)] for _ in batch],
        )
        weight = recipe.naming * max(0.0, 1 - done / recipe.naming_until)
        loss, naming, look = losses(model, batch, packed, recipe.naming_layer, done >= recipe.looking_from)
        cool = 1 if done < recipe.hold else max(0.03, 1 - (done - recipe.hold) / (1 - recipe.hold))
        step(opts, parameters, loss + weight * naming + recipe.looking * look, min(1, (i + 1) / recipe.warmup) * cool)
        curriculum.saw(loss.item())
        if i % 100 == 0:
            spent = time.process_time() - start
            shown = f"level {level} loss {curriculum.loss:.3f} naming {naming.item():.3f} looking {look.item():.3f}"
            say(f"language {i}/{recipe.steps} cpu {spent:.0f} s {shown}")
        if pause is not None and (i + 1) % every == 0:
            pause(i + 1)
    model.eval()


# --- what came out ---------------------------------------------------------------------------------------------------


Keep = Callable[[world.Scene], np.ndarray]  # which visual tokens of a scene stay, bool [144], as many for every scene


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration,
    seeds: Iterable[int],
    rng: np.random.Generator,
    num: int = 14,
    keep: Keep | None = None,
    replace: bool = False,
    mixture: Mapping[str, float] = questions.MIXTURE,
) -> dict[str, list[bool]]:
    """Exact match by kind of question, answers read greedily from packed rows.

    keep: the tokens that stay, at their own positions; the others are removed, or, with `replace`, set to the mean of all
    projected tokens of their picture.
    """
    model.eval()
    right: dict[str, list[bool]] = {}
    seeds = list(seeds)
    for start in range(0, len(seeds), 16):
        batch = [world.scene(seed) for seed in seeds[start : start + 16]]
        asked = [questions.draw(s, rng, num, mixture) for s in batch]
        packed = vlm.pack([[a[1:] for a in row] for row in asked])
        image = model.model.multi_modal_projector(features(model, batch))
        kept = None if keep is None else torch.from_numpy(np.stack([keep(s) for s in batch]))
        if kept is not None and replace:
            image = torch.where(kept[..., None], image, image.mean(1, keepdim=True))
        hidden = model.model.language_model(
            inputs_embeds=vlm.embed(model, packed, image),
            attention_mask=packed.mask(None if replace else kept),
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
        wrong = (model.lm_head(hidden[:, :-1]).argmax(-1) != packed.labels[:, 1:]) & (packed.labels[:, 1:] >= 0)
        for b, row in enumerate(asked):
            for k, (kind, _, _) in enumerate(row):
                right.setdefault(kind, []).append(not wrong[b][packed.segments[b, 1:] == k + 1].any().item())
    return right
