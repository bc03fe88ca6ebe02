"""What every suite and demo measures and writes with: results, timing, tables."""
