"""A model by name: `embedded`, a local folder, or a hub checkpoint. safetensors only; no code from a checkpoint ever runs."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available, logging

from diffprune.core import registry
from diffprune.core.errors import first_line
from diffprune.core.spec import Name, Spec, parse
from diffprune.core.vlm import VLM
from diffprune.io import checkpoint
from diffprune.io.hub import refuse_mistyped
from diffprune.vlm.processor import Absent, read

logging.disable_progress_bar()  # type: ignore[no-untyped-call]

EMBEDDED = Path(__file__).parent.parent / "embedded" / "checkpoint"
ENDS = 2**20  # bytes of a weight file that its fingerprint reads at either end
EMBEDDED_NAME, TINY = "embedded", "tiny"
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
TRANSFORMERS = "5.23"  # the oldest: in 5.19 beams and draws differ in silence, in 5.20 SmolVLM fails, in 5.22 layers computed again


def load(
    name: str | Path | Spec = "embedded",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attention: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> VLM:
    """A frozen VLM of a supported family.

    name:       "embedded", a folder, or a hub name such as "llava-hf/llava-1.5-7b-hf" (fetched at `revision`), or "tiny(llava)", a
                small random instance of a family. Options of the family may stand behind it, as in
                "llava-hf/llava-1.5-7b-hf(image_mode='pad')"; this spelling is `VLM.name`; or a value of `model_spec`.
    device:     "auto" is the first GPU, else the CPU.
    dtype:      "auto" is float32 on the CPU and the checkpoint's own elsewhere.
    attention:  implementation of encoder and decoder: "sdpa", "eager" or "flash_attention_2"; "auto" is sdpa in the parts of a
                model that support it and eager in the others, as in PaliGemma 2.
    device_map: "auto" or {module: device} spreads a model over devices, with accelerate; instead of `device`.
    options:    the family's own, e.g. `image_mode` and `frame` of llava.

    Raises:
        ValueError: no such checkpoint, a family without a file under `models/`, damaged weights, an option that does not exist or
            that this machine cannot serve, or `trust_remote_code`.
    """
    if trust_remote_code:
        raise ValueError(f"{name}: trust_remote_code is refused; code from a checkpoint never runs here")
    asked, place = model_spec(name).with_options(**options), _place(device, device_map)
    kind = _dtype(dtype, place)
    _check_attention(attention, place)
    if asked.name == TINY:
        return _tiny(asked, place or torch.device("cpu"), torch.float32 if isinstance(kind, str) else kind, attention)
    source = _source(asked, revision)
    hub: dict[str, Any] = {"revision": revision or "main"}
    family: Any = _family(asked.name, _config(asked.name, source, hub))
    given = dict(asked.options)
    _check_options(family, given)
    if isinstance(source, Path):
        check(source)
    more = {"device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map} if device_map else {}
    model = _model(asked.name, source, dtype=kind, attn_implementation=None if attention == "auto" else attention, **more, **hub)
    if place is not None:
        model.to(place)
    parts = read(source, model.config.image_token_id, trust_remote_code=False, **hub)
    vlm: VLM = family(model.eval().requires_grad_(False), parts, asked, **given)
    return vlm


def described(name: str | Spec) -> None:
    """Look at a model's name, options and configuration, not at its weights.

    Raises:
        ValueError: `load` would refuse it.
    """
    asked = model_spec(name)
    if asked.name == TINY:
        _tiny(asked, torch.device("cpu"), torch.float32, "auto")
        return
    source = _source(asked, None)
    _check_options(_family(asked.name, _config(asked.name, source, {"revision": "main"})), dict(asked.options))


def _tiny(asked: Spec, place: torch.device, kind: torch.dtype, attention: str) -> VLM:
    """`tiny(llava)`, `tiny(llava, image_mode='pad')`: a family's random instance of a few narrow layers; needs no files."""
    options = dict(asked.options)
    family: Any = _found(options.pop("family"))
    _check_options(family, options)
    parts = family.tiny()
    if attention != "auto":
        parts.model.set_attn_implementation(attention)
    vlm: VLM = family(parts.model.to(place, kind), parts.processor, asked, **options)
    return vlm


def wrap(model: Any, processor: Any = None, name: str = "", **options: Any) -> VLM:
    """The family's view of a transformers model that is already loaded; the model itself is left as it is.

    Of a model that torch.compile or PEFT has wrapped, the model inside is meant, which runs in their calls as well.

    Without its processor it serves rows a processor made (`VLM.read`), not images and questions.

    Raises:
        ValueError: it is no vision-language model, of a family without a file under `models/`, or the processor is none.
    """
    model = getattr(model, "_orig_mod", model)
    if callable(inside := getattr(model, "get_base_model", None)):
        model = inside()
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or not hasattr(model, "generate") or not hasattr(getattr(model, "model", None), "get_image_features"):
        raise ValueError(
            f"{type(model).__name__} is no vision-language model that generates; "
            "give a transformers model of the ...ForConditionalGeneration kind"
        )
    if processor is not None and not all(hasattr(processor, part) for part in ("image_processor", "tokenizer")):
        raise ValueError(f"{type(processor).__name__} is no processor of images and text; give what AutoProcessor loads")
    name = name or Path(getattr(model, "name_or_path", "") or kind).name
    family: Any = _family(name, {"model_type": kind})
    _check_options(family, options)
    processor = Absent() if processor is None else processor
    vlm: VLM = family(model, processor, Spec(name).with_options(**options), **options)
    return vlm


# -- names -------------------------------------------------------------------------------------------------------------


def model_spec(name: str | Path | Spec) -> Spec:
    """A model by its spelling: `embedded`, a folder, `owner/name`, `tiny(family)`, each with options of its family in brackets.

    A folder is called by its own name, wherever it lies.

    Raises:
        ValueError: what stands in the brackets is no list of options, or what is no name at all.
    """
    if isinstance(name, Spec):
        return name
    if not isinstance(name, str | Path):
        raise ValueError(f"a model is named by a text or a folder, as 'embedded' or 'models/mine', not by {f'{name!r}':.80}")
    name = str(name)
    bare, options = name, dict[str, Any]()
    if name.endswith(")") and "(" in name and not os.path.exists(name):
        bare, inside = name[:-1].split("(", 1)
        call = parse(f"model({inside})")
        first = [("family", value) for value in call.args] if bare == TINY else []
        options = dict([*first, *call.options])
        if len(options) < len(call.args) + len(call.options) or (bare == TINY and not isinstance(options.get("family"), str)):
            hint = "tiny(family), as in tiny(llava)" if bare == TINY else f"options with names, as in {bare}(image_mode='pad')"
            raise ValueError(f"{name!r:.200}: write {hint}")
        options = {key: str(value) if isinstance(value, Name) else value for key, value in options.items()}
    folder = Path(os.path.expanduser(bare))
    if bare != EMBEDDED_NAME and os.path.isdir(folder):
        return Spec(folder.resolve().name).with_options(**options).at(folder=folder.absolute())
    return Spec(bare).with_options(**options)


def fingerprint(asked: Spec) -> str:
    """Of a checkpoint in a folder: a hash of its configuration, and of size, header and ends of its weight files, read in an
    instant. "" for models that are known by name alone.
    """
    folder = EMBEDDED if asked.name == EMBEDDED_NAME else asked.place("folder")
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for path in [folder / checkpoint.CONFIG, *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as stream:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + stream.read(ENDS))
            stream.seek(max(0, path.stat().st_size - ENDS))
            digest.update(stream.read())
    return digest.hexdigest()[:20]


def _source(asked: Spec, revision: str | None) -> Path | str:
    name, folder = asked.name, EMBEDDED if asked.name == EMBEDDED_NAME else asked.place("folder")
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"no model {name!r}: there is no folder {folder} any more")
        if revision:
            raise ValueError(f"{name} is a folder; revision {revision!r} exists for hub checkpoints only")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"no model {name!r:.200}: write 'embedded', a checkpoint's folder, or a hub name such as 'llava-hf/llava-1.5-7b-hf'"
        )
    refuse_mistyped(name)
    return name


def _config(name: str, source: Path | str, hub: dict[str, Any]) -> dict[str, Any]:
    """config.json as it stands."""
    if isinstance(source, Path):
        return checkpoint.read_config(source)
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no folder {name} here, and no model configuration of the Hub can be read ({first_line(error)})"
        ) from None
    return dict(found)


def _family(name: str, config: dict[str, Any]) -> type:
    """The class under `models/` for a configuration."""
    kind, known = config.get("model_type"), registry.names("models")
    if kind in known:
        return _found(kind)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{name} is of the family {kind!r}, which nobody has added yet: write diffprune/models/{kind}.py (CONTRIBUTING.md "
            f"says how); there are {', '.join(known)}"
        )
    if "auto_map" in config:
        raise ValueError(f"{name}: the model's code lies in its checkpoint (trust_remote_code), which never runs here")
    raise ValueError(f"{name}: {kind!r} is no vision-language model; families here are {', '.join(known)}")


def _found(family: str) -> type:
    """The class of a family by its name, in the transformers that is installed."""
    if Version(transformers.__version__) < Version(TRANSFORMERS):
        here = f"transformers {transformers.__version__} is installed here, with which a model may answer otherwise"
        raise ValueError(f"{here}: install transformers {TRANSFORMERS} or later")
    return registry.find("models", family)


def _check_options(family: type, options: Mapping[str, Any]) -> None:
    known = list(inspect.signature(family).parameters)[3:]  # behind model, processor, name
    for key in options:
        if key not in known:
            raise ValueError(
                f"models of the family {family.__module__.rpartition('.')[2]} have no option {key!r}: "
                + (registry.nearest(key, known) if known else "they take none")
            )


# -- where and how it runs ---------------------------------------------------------------------------------------------


def _place(device: str | torch.device, device_map: str | Mapping[str, Any] | None) -> torch.device | None:
    """The device; None where a map says it."""
    if device_map is not None:
        if device != "auto":
            raise ValueError(f"device {device!r} and a device_map were given; give one of them")
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError("device_map needs accelerate: pip install accelerate, or give one device")
        return None
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"no device {device!r} ({first_line(error)})") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {str(found)!r}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return found


def _dtype(dtype: str | torch.dtype, place: torch.device | None) -> str | torch.dtype:
    if dtype == "auto":
        return torch.float32 if place is not None and place.type == "cpu" else "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"no dtype {dtype!r} for weights: it is 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def _check_attention(attention: str, place: torch.device | None) -> None:
    if attention not in ATTENTION:
        raise ValueError(f"no attention {attention!r}: {registry.nearest(attention, ATTENTION)}")
    if attention == "flash_attention_2" and (not is_flash_attn_2_available() or (place is not None and place.type != "cuda")):
        raise ValueError("flash_attention_2 needs the package flash-attn and a CUDA GPU; use 'sdpa' here")


def _model(name: str, source: Path | str, **options: Any) -> Any:
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        if "attention implementation" in str(error):
            wanted = options["attn_implementation"]
            raise ValueError(f"{name}: a part of it has no attention {wanted!r}; with 'auto' such a part runs eager") from None
        raise ValueError(f"{name}: the weights cannot be loaded or do not fit config.json ({first_line(error)})") from None
    wrong = [*found["missing_keys"], *found["mismatched_keys"]]
    if wrong:
        raise ValueError(f"{name}: the weights do not fit config.json, first at {wrong[0]}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name}: not all weights fit the devices of device_map; give more devices or a smaller dtype")
    checkpoint.check_finite(dict(model.named_parameters()), name)
    return model


def check(folder: Path) -> None:
    """Refuse a local checkpoint with missing, pickled or incomplete weights before any of them are read.

    A folder that carries `model.safetensors.sha256` (the embedded model does) is also checked for flipped bits.

    Raises:
        ValueError: names the file and the reason.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        raise ValueError(f"{folder}: no safetensors weights" + (f"; {pickled[0]} is a pickle, which is refused" if pickled else ""))
    for path in found:
        listed = path.with_name(path.name + ".sha256")
        checkpoint.check_file(path, listed.read_text().split()[0] if listed.is_file() else None)
