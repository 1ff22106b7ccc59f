"""Kernels for NVIDIA GPUs. Importing this folder's modules needs the package triton."""
