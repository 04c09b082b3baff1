"""Outputs of tasks by their content, and the models among them with their history."""
