"""One file per protection of a sum; the file's name is what `protection:` says."""
