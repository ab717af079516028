"""The interface workers speak over, and the lines of a step log in a bucket."""

from __future__ import annotations

import os

import pytest
import ray
from blob_stores import MemoryBlobs

from diffprune.distributed.interface import SETTINGS, interface, use_own
from diffprune.train.step_log import PieceLog


def test_the_interface_is_that_of_the_nodes_address_unless_a_user_says_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface("127.0.0.1") == "lo" and interface("192.0.2.77") is None
    for setting in SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.77")
    use_own()
    assert not os.environ.keys() & set(SETTINGS), "left to gloo and NCCL"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    use_own()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_lines_of_several_workers_stand_in_the_order_they_were_shown_and_late_ones_of_an_older_attempt_before() -> None:
    blobs = MemoryBlobs()
    first, other, old = PieceLog(blobs, 2), PieceLog(blobs, 2), PieceLog(blobs, 1)
    first.append(b"a\n")
    assert first.read() == b"", "waits until it is to be durable, or for a while"
    first.append(b"b\n", durable=True)
    place = first.newer(None)[1]
    other.append(b"c\n", durable=True)
    first.append(b"d\n")
    first.flush()
    old.append(b"late\n", durable=True)
    assert first.newer(place)[0] == b"c\nd\n" and first.read() == b"late\na\nb\nc\nd\n"
    first.flush()
    assert len(blobs.list("steps")) == 4, "nothing waits, so nothing is written"
