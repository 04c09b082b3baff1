"""Secure aggregation after Bonawitz et al. 2017: what its parties say to each other, as pure machines."""
