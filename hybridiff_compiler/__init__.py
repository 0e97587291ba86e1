"""Compile-time graph partitioning for diffusion inference on several GPUs."""
