"""One file per transport; the file's name is the transport's name."""
