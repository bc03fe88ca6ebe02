"""The Triton kernels on a GPU, or without one: settings, bounds, machine code, races."""
