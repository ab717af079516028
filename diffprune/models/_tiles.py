"""Idefics3 and SmolVLM: pictures split into rows and columns of tiles, text tokens between them, then the whole picture once more.

A picture is resized, split into tiles of the encoder's size and followed by itself as one tile; its tokens are those of all its
tiles, one budget over them. ENCODED is one row per visual token: a square of neighbouring patches, after the pixel shuffle and
before the projector. What stands between tiles (`<row_1_col_1>`, `<global-img>`, newlines) is text and stays. Frames of a video,
as a user's processor makes them, are pictures with a budget each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffprune.core.vlm import Prompts, Shape
from diffprune.models._patches import patch_shape
from diffprune.vlm import tiny
from diffprune.vlm.family import Family
from diffprune.vlm.image_token_runs import runs

AROUND, GLOBAL = "<fake_token_around_image>", "<global-img>"


class Tiles(Family):
    """Pixels: pixel_values [I tiles 3 H W] and pixel_attention_mask [I tiles H W], zero tiles as padding; and grid [I 2], ours:
    rows and columns of tiles, 0 and 0 where a picture is not split."""

    projector_input = "connector.modality_projection"
    encoder_inputs = ("pixel_values", "pixel_attention_mask")

    def _shape(self) -> Shape:
        rows, columns = self._default_grid()
        return patch_shape(self.model.config, rows * columns + 1)

    def _default_grid(self) -> tuple[int, int]:
        """Rows and columns of a square picture of the processor's size; (0, 0) where a model came without its processor."""
        if not self.processor:
            return 0, 0
        pictures = self.processor.image_processor
        side = pictures.size["longest_edge"]
        _, rows, columns = pictures.get_number_of_image_patches(side, side)
        return rows, columns

    @property
    def num_visual_tokens(self) -> int:
        """Of a square picture of the processor's size."""
        return self.shape.tiles * self._per_tile

    @property
    def _per_tile(self) -> int:
        return self.shape.patches // self.model.config.scale_factor**2

    # -- images --------------------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Any]) -> dict[str, Tensor]:
        made = self.processor.image_processor([[image] for image in images], return_row_col_info=True, return_tensors="pt")
        grid = torch.tensor([[*rows, *columns] for rows, columns in zip(made["rows"], made["cols"], strict=True)])
        return self._placed({name: made[name] for name in self.encoder_inputs if name in made} | {"grid": grid})

    def part(self, pixels: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        tiles = int(num_tiles(pixels["grid"][start:stop]).max())
        return {n: v[start:stop] if n == "grid" else v[start:stop, :tiles] for n, v in pixels.items()}

    def slots(self, pixels: dict[str, Tensor]) -> list[int]:
        tiles = num_tiles(pixels["grid"]) if "grid" in pixels else (pixels["pixel_values"] != 0).flatten(2).any(2).sum(1)
        return [n * self._per_tile for n in tiles.tolist()]

    def layout(self, pixels: dict[str, Tensor]) -> Tensor | None:
        return pixels.get("grid")

    def per_token(self, values: Tensor, pixels: dict[str, Tensor]) -> Sequence[Tensor]:
        """By the pixel shuffle of the family's own connector."""
        width, side = values.shape[-1], self.model.config.scale_factor
        squares = self.model.model.connector.pixel_shuffle(values.view(-1, self.shape.patches, width), side)
        return squares.reshape(-1, side**2, width).mean(1).split(self.slots(pixels))

    # -- text ----------------------------------------------------------------------------------------------------------

    def chat_prompt(self, question: str, images: int = 1) -> str:
        """The chat template, the end of each picture written out."""
        return super().chat_prompt(question, images).replace(self.image_placeholder, self.image_placeholder + AROUND)

    def placeholder_ids(self, num: int, layout: Tensor | None) -> list[int]:
        rows, columns = self._default_grid() if layout is None else layout.tolist()
        before = [
            "\n" * (row > 0 and column == 0) + AROUND + f"<row_{row + 1}_col_{column + 1}>"
            for row in range(rows)
            for column in range(columns)
        ]
        before.append("\n\n" * (rows > 0) + AROUND + GLOBAL)
        tile = [self.image_token_id] * (num // len(before))
        texts = self.processor.tokenizer(before, add_special_tokens=False)["input_ids"]
        return [token for text in texts for token in (*text, *tile)]

    def read(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Prompts]:
        """As the base class; pictures are told from the text between runs of image tokens, and get a row of pixels each."""
        given, prompts = super().read(inputs)
        found = [
            grid(row, where) for row, where in zip(prompts.input_ids, runs(prompts.input_ids, self.image_token_id), strict=True)
        ]
        grids = torch.tensor([g for row in found for g in row], device=self.device).reshape(-1, 2)
        tiles = given["pixel_values"].flatten(0, 1)
        real = (tiles != 0).flatten(1).any(1)  # as the family's own code tells padding tiles
        sizes = num_tiles(grids).tolist()
        if sum(sizes) != int(real.sum()):
            raise ValueError(
                f"the rows show {sum(sizes)} tiles of pictures, pixel_values has {int(real.sum())}; both come from one call of "
                f"the model's processor"
            )
        each = {n: pad_sequence(v.flatten(0, 1)[real].split(sizes), batch_first=True) for n, v in given.items()}
        return {**each, "grid": grids}, prompts


def num_tiles(grids: Tensor) -> Tensor:
    """[I 2] rows and columns -> [I] tiles, that of the whole picture included."""
    return grids.prod(1) + 1


def grid(ids: Tensor, where: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows and columns of tiles of each picture of one row of ids [S], from the text between its runs of image tokens.

    Needs no tokenizer. What follows the last run of a row ends a picture and is the token AROUND. Between tiles of a picture it
    stands once, first in the text or, at the start of a line of tiles, after a newline; between pictures it stands twice.
    """
    if not where:  # a row without pictures
        return []
    around = ids[where[-1][1]] if where[-1][1] < len(ids) else -1
    found: list[tuple[int, int]] = []
    tiles, lines = 1, 0
    for (_, stop), (start, _) in zip(where, [*where[1:], (len(ids), 0)], strict=True):
        between = ids[stop:start]
        if int((between == around).sum()) == 1 and start < len(ids):
            tiles, lines = tiles + 1, lines + int(between[0] != around)
        else:
            found.append((lines, (tiles - 1) // max(lines, 1)))
            tiles, lines = 1, 0
    return found


# -- tiny instances ----------------------------------------------------------------------------------------------------


def tiny_parts(make: Any) -> tiny.Parts:
    """Byte-level tokenizer with the tags of up to 2 x 2 tiles, and an image processor of the class `make`: tiles of 16 px."""
    tags = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    pictures = make(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return tiny.Parts(pictures, tiny.tokenizer(AROUND, GLOBAL, "<end_of_utterance>", *tags))


def tiny_settings(parts: tiny.Parts) -> dict[str, Any]:
    """Settings of a model of 16 patches and 4 tokens a tile."""
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    text = {"model_type": "llama", **tiny.decoder(parts.tokenizer)}
    return {"vision_config": vision, "text_config": text, "image_token_id": tiny.IMAGE, "scale_factor": 2}
