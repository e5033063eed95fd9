"""The card template, and the rendered cards of measured checkpoints."""
