"""What attention sites are like: the shift of their keys, and where their queries look."""
