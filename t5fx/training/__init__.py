"""What brings the quality of a linearized model back."""
