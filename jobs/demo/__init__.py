"""The embedded default: a synthetic noisy web on loopback and the whole job over it."""
