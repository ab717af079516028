"""Small folders in the published schemas, made by us: a few rows each, with drawn pictures. Never the real data.

For tests, and for `--tiny` jobs that run a table end to end without a network. The manifest beside the files says `fixture`, so
every cell on them carries a revision like `gqa@fixture-1a2b3c`. Among the rows are those that break readers: rotations of two to
four, options missing as null and as the text nan, missing hints, pairs, refusals, lists of pictures and a video.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageDraw

from diffprune.io import dataset_manifest, dataset_rows, hub
from diffprune.io.dataset_manifest import FIXTURE, MANIFEST

Rows = list[dict[str, Any]]
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 150, 60), "yellow": (235, 200, 30)}
CHINESE = {"red": "红色", "blue": "蓝色", "green": "绿色", "yellow": "黄色"}
SIZE = 96  # pixels, what the embedded model takes as it is


def picture(number: int) -> dict[str, Any]:
    """A coloured shape on grey as the hub stores pictures; its colour is `colour(number)`."""
    image = Image.new("RGB", (SIZE, SIZE), (128, 128, 128 - number % 64))  # no two are the same
    draw, box = ImageDraw.Draw(image), (16, 16, 80, 80)
    (draw.ellipse if number % 2 else draw.rectangle)(box, fill=COLOURS[colour(number)])
    stream = BytesIO()
    image.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{number:012d}.png"}


def colour(number: int) -> str:
    """The colour of the shape in a picture."""
    return list(COLOURS)[number % len(COLOURS)]


def _shape(number: int) -> str:
    return "circle" if number % 2 else "square"


def _questions(number: int) -> Iterator[tuple[str, str]]:
    yield "What color is the shape?", colour(number)
    yield "Is the shape a circle?", "yes" if number % 2 else "no"


def _annotators(answer: str, agree: int = 10) -> list[str]:
    return [answer] * agree + ["something"] * (10 - agree)


def _gqa() -> dict[str, Rows]:
    rows = [
        {"id": f"{n:05d}{k}", "imageId": f"n{n}", "question": question, "answer": answer, "isBalanced": True, "fullAnswer": answer}
        for n in range(4)
        for k, (question, answer) in enumerate(_questions(n))
    ]
    images = [{"id": f"n{n}", "image": picture(n)} for n in (3, 1, 0, 2)]  # joined by name, not by place
    folder = "testdev_balanced_instructions/testdev-0000{}-of-00002.parquet"
    return {
        folder.format(0): rows[:5],
        folder.format(1): rows[5:],
        "testdev_balanced_images/testdev-00000-of-00001.parquet": images,
    }


def _rotated(base: int, number: int, rotations: int, options: list[str], question: str, **columns: Any) -> Rows:
    """The first option is right; rotation k moves the options k places to the left."""
    found = Rows()
    for rotation in range(rotations):
        turned = options[rotation:] + options[:rotation]
        cells = {letter: turned[i] if i < len(turned) else None for i, letter in enumerate("ABCD")}
        found.append({
            "index": base + rotation * 1_000_000, "question": question, "hint": None, "answer": "ABCD"[-rotation % len(options)],
            **cells, "category": "attribute_recognition", "image": picture(number), "source": "made by diffprune",
            "L2-category": "finegrained_perception", "comment": None, "split": "dev",
        } | columns)  # fmt: skip
    return found


def _mmbench(config: str, question: str, names: dict[str, str]) -> dict[str, Rows]:
    other = list(names.values())
    rows = _rotated(0, 0, 4, other, question)
    rows += _rotated(1, 1, 3, other[1:] + other[:1], question, hint="A shape is drawn.")  # four options, three rows
    rows += _rotated(2, 2, 2, other[2:], question, hint="nan", C="nan", D="nan", category="image_style")
    rows += _rotated(3, 3, 3, [other[3], *other[:2]], question, **{"L2-category": "coarse_perception", "category": "image_scene"})
    return {f"{config}/dev-00000-of-00001.parquet": rows}


def _mme() -> dict[str, Rows]:
    request = " Please answer yes or no."
    rows = []
    for category in ("color", "existence", "OCR", "code_reasoning"):
        for n in range(2):
            asked = f"Is there a {colour(n)} shape in the image?", f"Is there a {colour(n + 1)} shape in the image?"
            for k, question in enumerate(asked):
                blank = " " if category == "code_reasoning" else ""  # two blanks, as some published questions have
                rows.append({
                    "question_id": f"{category}/{n:04d}.png", "image": picture(n), "question": question + blank + request,
                    "answer": ("Yes", "No")[k], "category": category,
                })  # fmt: skip
    return {"data/test-00000-of-00001.parquet": rows}


def _pope() -> dict[str, Rows]:
    rows = [
        {"id": str(i), "question_id": str(2 * n + k + 1), "question": f"Is there a {shape} in the image?",
         "answer": "yes" if _shape(n) == shape else "no", "image_source": f"drawn_{n}", "image": picture(n), "category": category}
        for i, category in enumerate(("adversarial", "popular", "random"))
        for n in range(3) for k, shape in enumerate(("circle", "square"))
    ]  # fmt: skip
    return {"data/test-00000-of-00001.parquet": rows}


def _scienceqa() -> dict[str, Rows]:
    choices = list(COLOURS)
    rows = [
        {"image": picture(n), "question": "Which color does the shape have?", "choices": choices[: 2 + n % 3],
         "answer": n % 4 if n % 4 < 2 + n % 3 else 0, "hint": "" if n % 2 else "One shape is drawn.", "task": "closed choice",
         "grade": "grade2", "subject": "natural science" if n < 4 else "language science", "lecture": "", "solution": ""}
        for n in (0, 1, 1, 2, 4, 5)
    ]  # fmt: skip
    rows.append(dict(rows[0], question="Which is the fifth?", choices=[*choices, "grey"], answer=4, hint=""))
    return {"ScienceQA-IMG/test-00000-of-00001.parquet": rows}


def _vqav2() -> dict[str, Rows]:
    def records(texts: list[str]) -> Rows:
        return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]

    rows = []
    for n in range(4):
        for k, (question, answer) in enumerate([*_questions(n), ("How many shapes are there?", "1")]):
            rows.append({
                "question_type": "what color", "multiple_choice_answer": answer, "answers": records(_annotators(answer, 10 - n)),
                "image_id": n, "answer_type": ("other", "yes/no", "number")[k], "question_id": 1000 * n + k, "question": question,
                "image": picture(n),
            })  # fmt: skip
    return {"data/validation-00000-of-00001.parquet": rows}


def _textvqa() -> dict[str, Rows]:
    rows = [
        {"image_id": f"{n:016x}", "question_id": 34600 + 2 * n + k, "question": question.lower(), "image": picture(n),
         "answers": _annotators(answer, 7), "ocr_tokens": ["SHAPE", colour(n).upper()] if n else [], "set_name": "val"}
        for n in range(3) for k, (question, answer) in enumerate(_questions(n))
    ]  # fmt: skip
    return {"data/validation-00000-of-00001.parquet": rows}


def _seed() -> dict[str, Rows]:
    options = {f"choice_{x}": name for x, name in zip("abcd", COLOURS, strict=True)}
    rows = [
        {"question_id": str(n), "question": ("What color is the shape?", "Which color was drawn?")[n % 2], **options,
         "answer": "ABCD"[n // 2], "data_id": f"drawn_{n // 2}", "data_type": "image", "question_type_id": 1 + n % 3,
         "image": [picture(n // 2)], "segment": None}
        for n in range(6)
    ]  # fmt: skip
    rows.append(
        dict(rows[0], question_id="v1", data_type="video", data_id="clip", image=[picture(0), picture(1)], question_type_id=10)
    )
    return {"data/test-00000-of-00001.parquet": rows}


def _vizwiz() -> dict[str, Rows]:
    rows = [
        {"question_id": f"VizWiz_val_{n:08d}.jpg", "image": picture(n), "question": "what COLOR is this?",
         "answers": _annotators("unanswerable" if n % 2 else colour(n), 8), "category": "unanswerable" if n % 2 else "other"}
        for n in range(5)
    ]  # fmt: skip
    return {"data/val-00000-of-00001.parquet": rows}


_MAKE: dict[str, Callable[[], dict[str, Rows]]] = {
    "gqa": _gqa,
    "mmbench": lambda: _mmbench("en", "What color is the shape?", {name: name for name in COLOURS}),
    "mmbench_cn": lambda: _mmbench("cn", "图形是什么颜色？", CHINESE),
    "mme": _mme,
    "pope": _pope,
    "scienceqa": _scienceqa,
    "vqav2": _vqav2,
    "textvqa": _textvqa,
    "seed": _seed,
    "vizwiz": _vizwiz,
}
NAMES = tuple(_MAKE)


def tables(name: str) -> dict[str, Rows]:
    """Path within the repository -> rows, of one benchmark."""
    return _MAKE[name]()


def write(folder: Path | str, name: str) -> Path:
    """Write one benchmark's rows below `folder` in the hub's layout; returns the folder, to be given as folder=."""
    place = Path(folder) / name
    for path, rows in tables(name).items():
        dataset_rows.write_parquet(place / path, rows, row_group=3)
    dataset_manifest.Manifest(repository="made by diffprune; not the published data", commit=FIXTURE).write(place)
    return place


def write_all(folder: Path | str) -> dict[str, str]:
    """Every benchmark below one folder: name -> spelling, as in `gqa(folder='...')`."""
    return {name: f"{name}(folder={str(write(folder, name))!r})" for name in NAMES}


def made(name: str) -> Path:
    """One benchmark's folder below the machine's data folder, written when it is first asked for: what `folder='fixture'` means."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # another edition of this file makes other rows
    place = hub.data_folder(f"fixtures-{version}") / name
    if not (place / MANIFEST).is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent) as scratch:
            try:
                write(scratch, name).rename(place)
            except OSError:
                if not (place / MANIFEST).is_file():  # no other process was faster
                    raise
    return place
