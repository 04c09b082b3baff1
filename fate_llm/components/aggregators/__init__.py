"""One file per aggregation rule; the file's name is what `aggregator:` says."""
