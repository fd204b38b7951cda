"""Weights of a network as whole numbers of 8 bits, with one step for each row: easy to compress.

The predictions of the demo model lean on its small matrices, and hardly on the large ones, which are most of its size. So small
ones stay float16, and the larger the coarser: its v moves by less than rounding to bfloat16 would move it.
"""

import torch

FINENESS = {50_000: 32, 200_000: 4}  # by the number of elements from which it holds: steps in the root mean square of a row
LARGEST = 127
STEP = ".step"  # what is added to the name of a weight


def pack(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Large `weights` as int8 with a float16 step for each row, under their name + ".step"; the rest as float16."""
    packed = {}
    for name, weight in weights.items():
        fineness = [fine for least, fine in FINENESS.items() if weight.numel() >= least]
        if not fineness:
            packed[name] = weight.half()
            continue
        rows = weight.float().flatten(1)
        steps = (rows.square().mean(1).sqrt() / fineness[-1]).maximum(rows.abs().amax(1) / LARGEST).half()
        numbers = (rows / steps.float().clamp_min(torch.finfo(torch.float16).tiny)[:, None]).round().clamp(-LARGEST, LARGEST)
        packed[name], packed[name + STEP] = numbers.view_as(weight).to(torch.int8), steps
    return packed


def unpack(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights from what `pack` returned: float32 numbers that float16 can hold."""
    weights = {}
    for name, stored in packed.items():
        if name.endswith(STEP):
            continue
        steps = packed.get(name + STEP)
        weight = stored.float()
        if steps is not None:
            weight = (weight * steps.float().view(-1, *[1] * (weight.ndim - 1))).half().float()
        weights[name] = weight
    return weights
