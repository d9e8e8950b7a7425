"""Optimisers: what an update of a generated or predicted network needs beyond `torch.optim`."""
