"""TTT nodes in the place of attention, in whole graphs and in the modules that own it."""
