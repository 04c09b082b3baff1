"""Demo data of the example pipelines: three lenders and what each of them alone knows."""
