"""Without a GPU the tests run the kernels in Triton's interpreter, which Triton wants to know before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
