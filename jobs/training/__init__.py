"""What `jobs/pretrain.py` is made of: one loop for MED, captioner, filter, stage 1 and stage 2."""
