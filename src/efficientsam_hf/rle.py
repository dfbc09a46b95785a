# SPDX-License-Identifier: Apache-2.0
"""COCO run-length encoding of masks; the code stands with the models, so that published checkpoints carry it."""

from .models.rle_efficientsam import decode_rle, encode_rle, mask_to_counts, rle_area, rle_counts, rle_size


__all__ = ["decode_rle", "encode_rle", "mask_to_counts", "rle_area", "rle_counts", "rle_size"]
