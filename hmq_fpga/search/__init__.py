"""From a float PyTorch model to a QNet; torch only."""
