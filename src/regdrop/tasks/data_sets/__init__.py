"""Data sets by folder or hub id: which files make which split, and how they are read."""
