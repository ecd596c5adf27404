"""Semi-supervised methods, one file each, and the small parts they are made of: pure torch."""
