# SPDX-License-Identifier: Apache-2.0
"""Simulated prompts: clicks and boxes computed from masks.

Everything is batched over leading dimensions and runs on the masks' device. Coordinates are xy pixels, x to the right
and y down, and pixel column 0 has coordinate 0 (a click names a pixel, not a place between pixels). Randomness comes
from a `torch.Generator` on the masks' device.
"""

import torch


def uniform_points(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one pixel uniformly from each mask: (..., H, W) -> (..., 2), float32 xy pixels; (0, 0) for an empty mask.

    The pixel of a random rank is found through its row's count, so no random number per pixel is drawn.
    """
    flat = masks.flatten(0, -3) if masks.dim() > 3 else masks.reshape(-1, *masks.shape[-2:])
    per_row = flat.sum(-1, dtype=torch.int32).cumsum(-1)
    total = per_row[:, -1]
    dtype = torch.float32 if masks.device.type == "mps" else torch.float64  # of which Apple's GPUs have none
    fraction = torch.rand(total.shape, generator=generator, device=masks.device, dtype=dtype)
    rank = (fraction * total).long().clamp(max=(total - 1).clamp(min=0))
    row = (per_row <= rank[:, None]).sum(-1).clamp(max=flat.shape[-2] - 1)
    before = torch.where(row > 0, per_row.gather(1, (row - 1).clamp(min=0)[:, None])[:, 0], 0)
    in_row = flat[torch.arange(len(flat), device=flat.device), row].cumsum(-1)
    column = (in_row <= (rank - before)[:, None]).sum(-1)
    points = torch.where((total > 0)[:, None], torch.stack([column, row], -1), 0)
    return points.float().reshape(*masks.shape[:-2], 2)


def distance_transform(masks: torch.Tensor) -> torch.Tensor:
    """Exact Euclidean distance in pixels from mask pixels to the nearest pixel outside: (..., H, W) -> (..., H, W).

    What lies beyond the image counts as outside, so a pixel at the border has distance 1 at most. Separable (Saito and
    Toriwaki 1994): distances along the rows first, then the lower envelope along the columns, offset by offset, until
    no larger offset can lower any value.
    """
    height = masks.shape[-2]
    squared = _row_distance(masks).square()
    result = squared.clone()
    for offset in range(1, (height + 1) // 2 + 1):
        # The largest remaining distance bounds the useful offsets; asking is a sync on a GPU, so ask now and then.
        if offset % 8 == 1 and offset * offset >= result.amax():
            break
        shift = float(offset * offset)
        if offset < height:
            torch.minimum(result[..., offset:, :], squared[..., :-offset, :] + shift, out=result[..., offset:, :])
            torch.minimum(result[..., :-offset, :], squared[..., offset:, :] + shift, out=result[..., :-offset, :])
        edge = min(offset, height)
        result[..., edge - 1, :].clamp_(max=shift)
        result[..., height - edge, :].clamp_(max=shift)
    return result.sqrt()


def _row_distance(masks: torch.Tensor) -> torch.Tensor:
    """Distance along the row to the nearest outside pixel, the border counting as outside: (..., H, W) float32."""
    width = masks.shape[-1]
    columns = torch.arange(width, device=masks.device, dtype=torch.float32)
    left = torch.where(masks, -1.0, columns).cummax(-1).values
    right = torch.where(masks, float(width), columns).flip(-1).cummin(-1).values.flip(-1)
    return torch.minimum(columns - left, right - columns)


def center_points(masks: torch.Tensor) -> torch.Tensor:
    """The pixel deepest inside each mask: (..., H, W) -> (..., 2), float32 xy pixels; (0, 0) for an empty mask.

    Depth is the exact distance transform with the image border counting as boundary; ties go to the first pixel in
    row-major order.
    """
    width = masks.shape[-1]
    best = distance_transform(masks).flatten(-2)
    # argmax names no winner among equals, so the first index that reaches the maximum is searched for.
    index = (best == best.amax(-1, keepdim=True)).int().argmax(-1)
    return torch.stack([index % width, index // width], -1).float()


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Smallest boxes around the masks: (..., H, W) -> (..., 4) float32 xyxy, the maximum exclusive; zeros if empty."""
    bytes_ = masks.view(torch.uint8)  # amax of bytes is vectorised on CPU, any() of bools is 50 times slower
    x_min, x_max = _extent(bytes_.amax(-2).bool())
    y_min, y_max = _extent(bytes_.amax(-1).bool())
    return torch.stack([x_min, y_min, x_max, y_max], -1).float()


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last occupied position along the last dimension, (0, 0) if none is."""
    size = occupied.shape[-1]
    positions = torch.arange(size, device=occupied.device)
    first = torch.where(occupied, positions, size).amin(-1)
    last = torch.where(occupied, positions + 1, 0).amax(-1)
    return torch.where(last > 0, first, 0), last


def jitter_boxes(
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    generator: torch.Generator,
    fraction: float = 0.1,
    max_pixels: float = 20.0,
) -> torch.Tensor:
    """Move every box edge by normal noise: (..., 4) -> (..., 4), xyxy pixels of an image of size (H, W).

    The standard deviation is `fraction` of the box's side and the shift is cut at `max_pixels` (SAM paper,
    appendix A). The result stays inside the image and keeps at least one pixel in each direction.
    """
    height, width = image_size
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat_interleave(2, -1)[..., [0, 2, 1, 3]]
    noise = torch.randn(boxes.shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    moved = boxes + (noise * sides * fraction).clamp(-max_pixels, max_pixels)
    limit = boxes.new_tensor([width, height])
    low = torch.minimum(moved[..., :2].clamp(min=0), limit - 1)
    high = torch.minimum(torch.maximum(moved[..., 2:], low + 1), limit)
    return torch.cat([low, high], -1)


def error_points(
    predictions: torch.Tensor, masks: torch.Tensor, generator: torch.Generator, background: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the next click from where prediction and mask differ: (..., H, W) twice -> points (..., 2), labels (...).

    Label 1 on a missed pixel, 0 on a falsely covered one; with `background=False` only missed pixels are drawn. Where
    nothing is left to correct the click confirms the mask (uniform, label 1); an empty mask without error gives -1.
    """
    error = predictions ^ masks if background else masks & ~predictions
    region = torch.where(error.flatten(-2).any(-1)[..., None, None], error, masks)
    points = uniform_points(region, generator)
    return points, _labels_at(points, masks, region)


def _labels_at(points: torch.Tensor, masks: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """1 where the point's pixel is in the mask, 0 where not, -1 where the region it was drawn from is empty: (...)."""
    index = (points[..., 1] * masks.shape[-1] + points[..., 0]).long()
    inside = masks.flatten(-2).gather(-1, index[..., None])[..., 0].long()
    return torch.where(region.flatten(-2).any(-1), inside, -1)


def points_in_cells(
    cells: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor, scale: int, generator: torch.Generator
) -> torch.Tensor:
    """Turn clicks on a coarse grid into clicks on pixels: cells (..., 2) xy -> (..., 2) xy pixels of `masks`.

    A cell covers `scale` x `scale` pixels of `masks` (..., H, W). Of these a uniformly random one on the click's side
    of the mask is taken (inside for label 1, outside for label 0), or any where the cell has none.
    """
    offsets = torch.arange(scale, device=masks.device)
    rows = (cells[..., 1, None].long() * scale + offsets)[..., :, None]
    columns = (cells[..., 0, None].long() * scale + offsets)[..., None, :]
    patch = masks.flatten(-2).gather(-1, (rows * masks.shape[-1] + columns).flatten(-2))
    wanted = patch == (labels == 1)[..., None]
    score = torch.rand(wanted.shape, generator=generator, device=masks.device) + wanted
    index = score.argmax(-1)
    return cells * scale + torch.stack([index % scale, index // scale], -1)
