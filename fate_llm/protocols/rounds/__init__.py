"""Rounds: two pure machines and the driver that lends them a clock and a channel."""
