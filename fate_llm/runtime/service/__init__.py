"""A party as a service: what it says to others, its jobs as machines, its workers, its API."""
