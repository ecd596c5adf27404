"""Images with a class each, or none: where they come from and in which batches they leave."""
