"""A frozen model over several workers: each keeps a part of every decoder layer and gathers a layer when it runs.

PyTorch's `fully_shard` on a decoder that takes no gradient: only all-gathers in forward and backward, no reduction. The scorer
beside it is replicated and its gradients are averaged as ever. Vision encoder, projector, embeddings and head stay whole on every
worker: they are called from outside the decoder (questions are embedded, survivors projected) and are small beside its layers.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard

from diffprune.core.vlm import VLM
from diffprune.vlm.activation_checkpointing import decoder_layers


def spread(vlm: VLM, device: torch.device) -> VLM:
    """The same VLM on `device`, its decoder layers spread over all workers of the default process group. Every worker must call it.

    A model loaded on the CPU never has to fit a device as a whole, only the memory of its host, once per worker. Its hash is
    taken before its weights are taken apart.
    """
    assert vlm.weights_hash
    layers = decoder_layers(vlm.model)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    decoder = vlm.model.get_decoder()
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if p not in inside})
    vlm.model.to(device)
    vlm.device = device
    return vlm
