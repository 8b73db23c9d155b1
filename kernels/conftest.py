"""Without a GPU, run the kernels in Triton's interpreter: decided before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
