"""What the language model components share: models, records, templates, local training, scores."""
