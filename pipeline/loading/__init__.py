"""What the loader is made of: its order, its index, its cache, its images and its workers."""
