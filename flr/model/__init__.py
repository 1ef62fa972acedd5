"""The latent thought in a causal LM: reasoner, pieces, encoder, group_forward, forward, patch, checkpoint."""
