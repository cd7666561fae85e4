"""One thread per test process: the same numbers whatever the machine, and no fight over two cores."""

import torch

torch.set_num_threads(1)
