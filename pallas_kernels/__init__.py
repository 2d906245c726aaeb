"""Kernels: each folder has a reference, an XLA implementation and, where it pays, a Pallas one."""
