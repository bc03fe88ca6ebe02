"""What turns results into pages and pictures."""
