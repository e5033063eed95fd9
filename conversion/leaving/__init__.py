"""Expert choice in, plain Transformers classes out."""
