"""What features are: activations collected, classes by language, measures and their intervals. Arrays in, tables out."""
