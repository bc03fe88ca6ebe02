"""What a linearized model knows while it runs."""
