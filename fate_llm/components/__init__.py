"""One file per component; the file's name is what `component:` says in a pipeline. Torch is imported inside roles."""
