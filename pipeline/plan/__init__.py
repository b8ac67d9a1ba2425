"""Says what a stage is, what it depends on and what it is given."""
