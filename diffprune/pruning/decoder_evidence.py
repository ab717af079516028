"""What a method looks at inside the decoder, for each image, from hidden states or from queries and keys of its row."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.core.evidence import Evidence, EvidenceKind, Question
from diffprune.core.vlm import Prompts
from diffprune.pruning.rows import places_of_question
from diffprune.pruning.stages import Stage
from diffprune.vlm.attention_rows import Seen, attention_rows
from diffprune.vlm.image_token_runs import behind


def of_states(key: Evidence) -> bool:
    """Whether hidden states are looked at, instead of queries and keys."""
    return key.kind is EvidenceKind.DECODER_FEATURES


def layer_of(key: Evidence, cut_at: int) -> int | None:
    """The layer (from 0) that evidence for a cut before layer `cut_at` is read in; None where it is made at the cut itself."""
    return None if key.layer is None else key.layer if key.layer >= 0 else cut_at + key.layer


@torch.no_grad()
def evidence_of(key: Evidence, found: Seen | Tensor, rows: Stage) -> Tensor | Question:
    """Evidence for each image. found: queries and keys of a layer, or hidden states [B S D] that enter it, of `rows`."""
    if key.kind is EvidenceKind.DECODER_ATTENTION:
        assert isinstance(found, Seen)
        return _attention(key, found, rows)
    values = found.key.transpose(1, 2).flatten(2) if isinstance(found, Seen) else found
    if key.queries != "text":
        return rows.placed(values)
    places, real = places_of_question(rows.prompts)
    asked = values.gather(1, places[..., None].expand(-1, -1, values.shape[2]).to(values.device)).to(real.device)
    return Question(asked[rows.owner], real[rows.owner])


def _attention(key: Evidence, seen: Seen, rows: Stage) -> Tensor:
    if key.queries == "image":
        return _among_themselves(seen, rows)
    if key.queries == "last":
        return rows.placed(attention_rows(seen, _last(rows.prompts).to(seen.query.device), key.raw).transpose(1, 2))[..., 0]
    places, real = (part.to(seen.query.device) for part in places_of_question(rows.prompts))
    each = attention_rows(seen, places, key.raw).masked_fill(~real[..., None], 0).transpose(1, 2)
    if key.queries == "each":
        return rows.placed(each)
    return rows.placed((each.sum(2) / real.sum(1)[:, None].clamp_min(1))[..., None])[..., 0]


def _among_themselves(seen: Seen, rows: Stage) -> Tensor:
    """[I N]: raw attention of each visual token as a key of its image's tokens, by how far these are there.

    The mean over queries comes before the product, which is the same and needs no [N N] of them.
    """
    query, key = (rows.placed(values.transpose(1, 2).flatten(2)) for values in (seen.query, seen.key))
    groups, size = seen.key.shape[1], seen.key.shape[3]
    here = rows.tokens.valid.float() if rows.weight is None else rows.weight.where(rows.tokens.valid, 0.0)
    asked = (here[:, None] @ query.float())[:, 0] / here.sum(1, keepdim=True).clamp_min(1e-6)
    asked = asked.view(len(asked), groups, -1, size).mean(2)  # heads of a group share their key
    return torch.einsum("igd,ingd->in", asked, key.float().view(*key.shape[:2], groups, size)) * (seen.scaling / groups)


def _last(prompts: Prompts) -> Tensor:
    """[B 1]: place of each row's last token before its answer, which is the first label behind its pictures, if it has one."""
    end = prompts.input_ids.shape[1]
    if prompts.labels is None:
        return prompts.slots.new_full((len(prompts), 1), end - 1, dtype=torch.long)
    said = (prompts.labels >= 0) & behind(prompts.slots)
    return (torch.where(said.any(1), said.int().argmax(1), end)[:, None] - 1).clamp_min(0)  # a row without pictures asks nothing
