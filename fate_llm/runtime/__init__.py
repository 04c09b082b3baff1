"""Jobs: who runs what, where it is kept, and what people see of it. No torch, no component by name."""
