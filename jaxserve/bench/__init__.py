"""Benchmarks that ship with the product."""
