"""Arithmetic of protection. No torch, no pika, no files, no network, no threads."""
