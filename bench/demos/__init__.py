"""Pretrained or trained models converted, aligned and used, with their data."""
