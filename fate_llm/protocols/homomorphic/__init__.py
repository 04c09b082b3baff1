"""The protocol behind the sum `ckks`: what its sides agree on, and a pure machine for each of them."""
