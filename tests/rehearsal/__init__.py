"""CUDA without a GPU: fake tensors have a device, a dtype and a shape, and no values.

Every operator checks devices, dtypes and shapes, and every operation that would make the host wait
for a GPU is counted. What is rehearsed here has not run on a GPU: speed, numbers and kernels are
not tested.
"""
