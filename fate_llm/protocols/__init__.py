"""What parties say to each other: codec, channel, rounds, sums, transports. No torch."""
