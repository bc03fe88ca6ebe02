"""The first minutes on a borrowed GPU: ``python -m t5fx.bench.lease --out DIR``.

One plan, the most valuable result first (`plan`); a process for each step, so that a kernel that
poisons a CUDA context costs its own case only (`worker`, `child`); every result on disk before the
next begins, so that a run may be cut off at any moment and taken up again (`records`).
"""
