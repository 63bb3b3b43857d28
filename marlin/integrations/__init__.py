"""Other libraries' own ways to load models, taught to load converted checkpoints."""
