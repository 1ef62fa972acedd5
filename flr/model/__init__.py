"""The latent thought in a causal LM.

How it is made: reasoner, variants, pieces, encoder, forward, group_forward, patch.
How it is kept: saved_config, folder, checkpoint, adapter, adapter_mark, auto.
"""
