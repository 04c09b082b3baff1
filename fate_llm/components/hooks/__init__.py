"""One file per update hook; the file's name is what `hooks:` says."""
