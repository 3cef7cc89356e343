"""Published lists of images and captions, and images already on disk, as one stream of rows."""
