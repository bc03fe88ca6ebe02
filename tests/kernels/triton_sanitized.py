"""A small forward and backward of the Triton kernels, for test_triton.py to run under a checker."""

import torch
from triton_cases import arguments, run

for dim in (64, 72):
    case = arguments(device="cuda", batch=1, heads=2, head_dim=dim, value_dim=dim, grid=(9, 15),
                     dtype=torch.bfloat16, layout="packed")  # fmt: skip
    run(*case)
torch.cuda.synchronize()
