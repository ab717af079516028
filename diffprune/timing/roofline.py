"""Roofline of a prefill: every part of a prefill takes the longer of its arithmetic and its memory traffic.

A bound, not a prediction: no launch costs, no idle gaps, every operand moved once, every product at the device's rate. What a
measured speedup is held against is the ratio of two such times, which tells apart what the device forbids (weights have to be
read however few tokens are left) from what the program wastes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from diffprune.core.vlm import Shape
from diffprune.timing.flops import Work, prefill_work


@dataclass(frozen=True)
class Device:
    """Rates of dense bfloat16 arithmetic, FLOP/s, and of memory, bytes/s. basis: where the first is from."""

    name: str
    flops: float
    bytes: float
    basis: str


# pattern of the name the driver gives -> rates; boards of the same chip with other memory are not matched by mistake
KNOWN = (
    (
        r"\bH200\b(?! NVL)",
        Device("H200", 790e12, 4.8e12, "what large products sustain, about 80 % of the data sheet"),
    ),
    (r"\bH100 80GB HBM3\b", Device("H100 SXM", 989e12, 3.35e12, "data sheet")),
    (r"\bA100\b.*\b80GB\b", Device("A100 80 GB", 312e12, 2.0e12, "data sheet")),
    (r"\bRTX 4090\b", Device("RTX 4090", 165e12, 1.0e12, "data sheet")),
    (r"\bL40S\b", Device("L40S", 362e12, 0.86e12, "data sheet")),
)


def known(name: str) -> Device | None:
    """The rates of the device of this name; None where they are not known."""
    return next((device for pattern, device in KNOWN if re.search(pattern, name)), None)


def milliseconds(device: Device, parts: Sequence[Work]) -> float:
    """The sum over parts of the longer of arithmetic and traffic."""
    return 1e3 * sum(max(part.flops / device.flops, part.bytes / device.bytes) for part in parts)


def prefill_ms(device: Device, shape: Shape, visual: float, text: float, batch: int, element_bytes: int = 2) -> float:
    """Least time of one prefill of `batch` rows of `visual` + `text` tokens, ms."""
    return milliseconds(device, prefill_work(shape, (visual,) * shape.layers, text, batch, element_bytes))
