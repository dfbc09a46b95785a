# SPDX-License-Identifier: Apache-2.0
"""What a promptable model is worth on annotated pictures: mIoU by prompt, and mask AP of boxes."""

from .average_precision import average_precision, everything_average_precision, read_detections
from .miou import DEFAULT_PROTOCOLS, PROTOCOLS, ObjectScores, evaluate, score_objects, worst_pictures


__all__ = [
    "DEFAULT_PROTOCOLS",
    "PROTOCOLS",
    "ObjectScores",
    "average_precision",
    "evaluate",
    "everything_average_precision",
    "read_detections",
    "score_objects",
    "worst_pictures",
]
