# SPDX-License-Identifier: Apache-2.0
"""Random changes of a picture's light: exposure, contrast, saturation and white balance."""

import numpy as np
from PIL import Image


# Standard deviations of the logarithms of the factors, at strength 1.
EXPOSURE, CONTRAST, SATURATION, BALANCE = 0.12, 0.12, 0.25, 0.05


def change_light(
    image: Image.Image, generator: np.random.Generator, strength: float = 1.0, exposure: float = 1.0
) -> Image.Image:
    """An RGB picture in other light, as RGB; `exposure` is a factor on top of the random one.

    All changes together are one matrix of the colours, so they cost one pass over the pixels. Values beyond 0 and 255
    are cut off.
    """
    gain, contrast, saturation = np.exp(strength * generator.normal(0, (EXPOSURE, CONTRAST, SATURATION)))
    balance = gain * exposure * np.exp(strength * generator.normal(0, BALANCE, 3))
    mix = saturation * np.eye(3) + (1 - saturation) / 3
    offset = 128 * (1 - contrast)
    rows = np.concatenate([contrast * balance[:, None] * mix, np.full((3, 1), offset)], 1)
    return image.convert("RGB", tuple(rows.flatten().tolist()))
