"""The tables between our weight names and those of LAVIS, BLIP and transformers."""
