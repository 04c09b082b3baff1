"""One file per command; the file's name is the command's. Heavy imports happen inside the command."""
