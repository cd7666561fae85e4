"""Adding a part of a trained model's representation to a half-trained one: perplexity, translation, controls."""
