"""Kernel: values, errors and the seams. No torch, no pika, no network."""
