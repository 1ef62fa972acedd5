"""The latent thought in a causal LM, in reading order: reasoner, pieces, encoder, group_forward, forward, patch, checkpoint."""
