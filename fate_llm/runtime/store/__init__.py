"""What a party's service remembers: jobs, tasks, approvals, artifacts and models in a database."""
