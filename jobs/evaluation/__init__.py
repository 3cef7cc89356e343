"""How good a model is: retrieval, captions, and telling right captions from wrong ones."""
