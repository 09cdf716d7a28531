"""The engine: exact nearest neighbours, and the greedy selection of a coreset.

`distances` defines what is near; `neighbors` and `k_center` find it quickly, with kernels for GPUs beside
them.
"""
