"""A user's pictures, as the data set of a network has its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from noprop_example import open_picture, read_digit
from noprop_lab.settings import LabConfig


def read_picture(path: Path, config: LabConfig) -> Tensor:
    """A picture file as the config's data set has its images, uint8 (C, H, W). Raises Failure."""
    from PIL import ImageOps

    if config.dataset in ("mnist", "kmnist"):
        return read_digit(path)
    channels, *size = config.image_shape
    fitted = np.array(ImageOps.fit(open_picture(path).convert("RGB" if channels == 3 else "L"), size[::-1]))
    return torch.from_numpy(fitted).view(*size, channels).permute(2, 0, 1)
