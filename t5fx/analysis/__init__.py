"""What a graph says: where attention is, whether it may be rewritten, and whether that pays."""
