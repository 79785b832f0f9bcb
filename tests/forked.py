"""What the tests' processes have from the start: the server that forks them imports this once."""

import pytest
import torch
from conftest import spare

torch.set_num_threads(1)  # threads do not outlive a fork
spare(pytest.MonkeyPatch())
