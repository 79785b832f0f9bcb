"""What the tests' processes have from the start: the server that forks them imports this once."""

import pytest
import torch
from conftest import noprop, spare, undrawn

torch.set_num_threads(1)  # threads do not outlive a fork
spare(patch := pytest.MonkeyPatch())
patch.setattr(noprop, "picture", undrawn)
