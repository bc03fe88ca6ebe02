"""What `t5fx bench` measures, a module each, and what those modules measure it on."""
