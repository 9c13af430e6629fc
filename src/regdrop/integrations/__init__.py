"""One package or file a training framework; each imports the core and its own framework only."""
