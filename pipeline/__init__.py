"""What flows: samples, shards, corpora."""
