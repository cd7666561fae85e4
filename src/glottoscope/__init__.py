"""glottoscope: how language lives inside a language model, and how it came to."""
