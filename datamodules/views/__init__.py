"""Augmented views of images: many at once on any device, or one by one in the workers of a DataLoader."""
