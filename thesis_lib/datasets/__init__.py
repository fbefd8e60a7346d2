"""Data sets, each read in its published on-disk format by column and key names."""
